"""What `hfnoise generate` is told: one dataclass, checked before a model is loaded."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfnoise.guidance_options import ALL_GENERATE_OPTIONS, GUIDER_OPTIONS
from hfnoise.latents_options import INITIAL_NOISE_OPTIONS
from hfnoise.options import option_default, option_help

NO_GUIDER = "none"
INITIAL_NOISES = ("saved", "none")
SAVED_GUIDER = "saved"
AUTO = "auto"
DTYPES = ("float32", "float16", "bfloat16")
# torch.Generator takes 64 bits.
_MOST_SEED = 2**63
_TYPES: dict[str, Any] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
SEARCHES = ("random", "zero_order", "path")
_POSITIVE = (
    "num_inference_steps", "num_images_per_prompt", "batch_size", "height", "width", "num_frames", "patience",
    "noise_level_guidance", "budget", "preview_steps"
)  # fmt: skip


def _field(name: str) -> Any:
    default = option_default(ALL_GENERATE_OPTIONS, name)
    return field(default=default, metadata={"help": option_help(ALL_GENERATE_OPTIONS, name)})


@dataclass
class GenerateConfig:
    """A run of `hfnoise generate`; `hfnoise generate --help` describes the options.

    Args:
        model_name_or_path (`str`): Hub id, folder of a diffusers pipeline, or an embedded one.
        revision (`str`, *optional*): on the Hub.
        prompt (`list[str]` or `str`, *optional*), prompts_file (`str`, *optional*): one of the two.
        negative_prompt (`str`, *optional*): for all prompts.
        num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*), height (`int`, *optional*),
            width (`int`, *optional*), num_frames (`int`, *optional*): the pipeline's by default.
        num_images_per_prompt (`int`, defaults to `1`), batch_size (`int`, defaults to `4`), seed (`int`, defaults to
            `0`): sample i is made from seed + i.
        dtype (`str`, *optional*), device (`str`, *optional*): float32 on a CPU, bfloat16 elsewhere.
        guider (`str`, defaults to `"adaptive"`): names joined by `+`, `"saved"` or `"none"`.
        output_dir (`str`, defaults to `"generated"`): where everything is written.
        threshold, space, min_steps, patience: of [`AdaptiveGuidance`].
        eta, norm_threshold (`float` or `"auto"`, *optional*), momentum, space: of [`ProjectedGuidance`].
        policy, coefficients: of [`LinearGuidance`]; the second is a file.
        initial_noise (`str`, *optional*): `"saved"` or `"none"`; by default the saved one, if there is one.
        oms_module (`str`, *optional*), oms_variant (`str`, *optional*), oms_eta (`float`, *optional*),
            oms_guidance_scale (`float`, *optional*), oms_scale (`float`, *optional*): of [`OneMoreStep`]; the last
            three also of a saved one.
        brightness (`float`, *optional*): of [`BrightnessOffset`].
        seed_variation (`float`, *optional*), variation_seed (`int`, *optional*): of [`SeedVariation`].
        redenoise (`bool`, *optional*), redenoise_strength (`float`, *optional*): of [`ReDenoise`].
        noise_level_guidance (`int`, *optional*): steps of [`NoiseLevelGuidance`].
        npnet (`str`, *optional*), npnet_scale (`float`, *optional*): of [`NoisePromptNet`] or [`NPNet`].
        search (`str`, *optional*), budget (`int`, *optional*), verifier (`str`, *optional*), preview_steps (`int`,
            *optional*): of [`RandomSearch`], [`ZeroOrderSearch`] or [`PathSearch`].

    Raises:
        ValueError, TypeError: if an option is out of range or of the wrong type, or belongs to a guider that is not
            asked for.

    Example:
        >>> from hfnoise.pipelines.generate_config import GenerateConfig
        >>> config = GenerateConfig("digits", prompt=["the digit seven"], guider="adaptive", threshold=0.99)
        >>> print(config.command)
        hfnoise generate --model_name_or_path digits --prompt 'the digit seven' --threshold 0.99
    """

    model_name_or_path: str = _field("model_name_or_path")
    revision: str | None = _field("revision")
    prompt: list[str] | None = _field("prompt")
    prompts_file: str | None = _field("prompts_file")
    negative_prompt: str | None = _field("negative_prompt")
    num_inference_steps: int | None = _field("num_inference_steps")
    guidance_scale: float | None = _field("guidance_scale")
    num_images_per_prompt: int = _field("num_images_per_prompt")
    seed: int = _field("seed")
    batch_size: int = _field("batch_size")
    height: int | None = _field("height")
    width: int | None = _field("width")
    num_frames: int | None = _field("num_frames")
    dtype: str | None = _field("dtype")
    device: str | None = _field("device")
    guider: str = _field("guider")
    output_dir: str = _field("output_dir")
    threshold: float = _field("threshold")
    space: str = _field("space")
    min_steps: float = _field("min_steps")
    patience: int = _field("patience")
    policy: str = _field("policy")
    coefficients: str | None = _field("coefficients")
    eta: float = _field("eta")
    norm_threshold: float | str | None = _field("norm_threshold")
    momentum: float | None = _field("momentum")
    initial_noise: str | None = _field("initial_noise")
    oms_module: str | None = _field("oms_module")
    oms_variant: str | None = _field("oms_variant")
    oms_eta: float | None = _field("oms_eta")
    oms_guidance_scale: float | None = _field("oms_guidance_scale")
    oms_scale: float | None = _field("oms_scale")
    brightness: float | None = _field("brightness")
    seed_variation: float | None = _field("seed_variation")
    variation_seed: int | None = _field("variation_seed")
    redenoise: bool | None = _field("redenoise")
    redenoise_strength: float | None = _field("redenoise_strength")
    noise_level_guidance: int | None = _field("noise_level_guidance")
    npnet: str | None = _field("npnet")
    npnet_scale: float | None = _field("npnet_scale")
    search: str | None = _field("search")
    budget: int | None = _field("budget")
    verifier: str | None = _field("verifier")
    preview_steps: int | None = _field("preview_steps")

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            self.prompt = [self.prompt]
        for option in ALL_GENERATE_OPTIONS:
            setattr(self, option.name, _checked(option.name, option.type, getattr(self, option.name), option.default))
        if not self.model_name_or_path:
            raise ValueError("model_name_or_path is needed: a Hub id, a folder, or digits.")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if (self.height is None) != (self.width is None):
            raise ValueError(
                f"height and width go together, got {self.height} and {self.width}: Stable Diffusion takes no notice "
                "of one alone."
            )
        if not 0 <= self.seed < _MOST_SEED:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}.")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        self._check_guiders()
        self._check_start()
        self.prompts()

    @property
    def guiders(self) -> tuple[str, ...]:
        """The names of the guiders that are asked for, in the order of their work."""
        given = self.guider.split("+")
        return tuple(name for name in GUIDER_OPTIONS if name in given)

    def _check_guiders(self) -> None:
        given = self.guider.split("+")
        known = [*GUIDER_OPTIONS, SAVED_GUIDER, NO_GUIDER]
        alone = len(given) == 1 and given[0] in known
        if not alone and (len(set(given)) != len(given) or not set(given) <= set(GUIDER_OPTIONS)):
            raise ValueError(
                f"guider must be one of {', '.join(known)}, or several of the first three joined by +, such as "
                f"adaptive+projected; got {self.guider!r}."
            )
        taken = {option.name for name in self.guiders for option in GUIDER_OPTIONS[name]}
        for guider, options in GUIDER_OPTIONS.items():
            for option in options:
                if option.name not in taken and getattr(self, option.name) != option.default:
                    raise ValueError(
                        f"{option.name} is of the guider {guider!r}, and the guider is {self.guider!r}: leave it out, "
                        f"or ask for that guider too."
                    )

    def _check_start(self) -> None:
        if self.initial_noise not in (None, *INITIAL_NOISES):
            raise ValueError(f"initial_noise must be {' or '.join(INITIAL_NOISES)}, got {self.initial_noise!r}.")
        if self.oms_variant is not None and self.oms_module is None:
            raise ValueError(f"oms_variant is {self.oms_variant!r}, of an oms_module that is not given.")
        for name, options in INITIAL_NOISE_OPTIONS.items():
            given = [option.name for option in options[1:] if getattr(self, option.name) is not None]
            # Searches are never saved.
            absent = self.initial_noise == "none" or name == "search"
            if given and getattr(self, name) is None and absent:
                if name == "search":
                    raise ValueError(f"{given[0]} is of search, which is not given: {', '.join(SEARCHES)}.")
                raise ValueError(f"{given[0]} is of {name}, which is not given, and initial_noise is 'none'.")
        if self.redenoise is False:
            raise ValueError("redenoise is on where it is named: leave it out.")
        if self.search is not None:
            if self.search not in SEARCHES:
                raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {self.search!r}.")
            if missing := [name for name in ("budget", "verifier") if getattr(self, name) is None]:
                raise ValueError(f"search needs {' and '.join(missing)}: evaluations of an image, and what compares.")
        limits = {"oms_eta": (0.0, 1.0), "oms_guidance_scale": (0.0, math.inf), "oms_scale": (0.0, math.inf)}
        limits |= {"brightness": (-1.0, 1.0), "seed_variation": (0.0, 1.0), "npnet_scale": (0.0, math.inf)}
        for name, (low, high) in {**limits, "redenoise_strength": (0.0, math.inf)}.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                wanted = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
                raise ValueError(f"{name} must be {wanted}, got {value}.")

    def prompts(self) -> list[str]:
        """Return the prompts.

        Raises:
            ValueError: if there are none, or both sources are given, or the file cannot be read.
        """
        if (self.prompt is None) == (self.prompts_file is None):
            raise ValueError("give either prompt or prompts_file, a text file with a prompt on each line.")
        if self.prompts_file is None:
            found = list(self.prompt or [])
        else:
            try:
                text = Path(self.prompts_file).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"prompts_file {self.prompts_file!r} cannot be read: {error}.") from None
            found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise ValueError(f"there are no prompts in {self.prompts_file or 'prompt'}.")
        return found

    def make_guider(self) -> Any:
        """Return the guider that is asked for, with its inner ones; `None` without, and for a saved one.

        Raises:
            ValueError: if one of its options is out of range.

        Example:
            >>> from hfnoise.pipelines.generate_config import GenerateConfig
            >>> config = GenerateConfig("digits", prompt=["seven"], guider="adaptive+projected", norm_threshold=15.0)
            >>> config.make_guider().inner.norm_threshold
            15.0
        """
        from hfnoise.guidance import LinearCoefficients
        from hfnoise.pipelines.guiders import AdaptiveGuidance, LinearGuidance, ProjectedGuidance

        made: Any = None
        # From the innermost one outwards; a run has one scale, and it is the outermost one's.
        for place, name in enumerate(reversed(self.guiders)):
            scale = self.guidance_scale if place + 1 == len(self.guiders) else None
            if name == "projected":
                # The similarity may be taken where a projection is not defined.
                space = self.space if self.space == "model" or len(self.guiders) == 1 else "x0"
                made = ProjectedGuidance(
                    guidance_scale=scale, eta=self.eta, norm_threshold=self.norm_threshold, momentum=self.momentum,
                    space=space,
                )  # fmt: skip
            elif name == "linear":
                file = self.coefficients
                fitted = None if file is None else LinearCoefficients.load(Path(file).expanduser())
                made = LinearGuidance(guidance_scale=scale, policy=self.policy, coefficients=fitted, inner=made)
            else:
                made = AdaptiveGuidance(
                    guidance_scale=scale, threshold=self.threshold, space=self.space, min_steps=self.min_steps,
                    patience=self.patience, inner=made,
                )  # fmt: skip
        return made

    @property
    def command(self) -> str:
        """The command line that makes the same again."""
        words = ["hfnoise", "generate"]
        for option in ALL_GENERATE_OPTIONS:
            value = getattr(self, option.name)
            if value != option.default:
                if value is True:
                    words.append(f"--{option.name}")
                    continue
                values = [str(entry) for entry in value] if isinstance(value, list) else [str(value)]
                # A value that begins with a dash would be taken for an option.
                for entry in values:
                    dashed = entry.startswith("-")
                    words += [f"--{option.name}={entry}"] if dashed else [f"--{option.name}", entry]
        return shlex.join(words)


def _checked(name: str, kind: str, value: Any, default: Any) -> Any:
    """Return a value in its type: YAML gives what it likes."""
    if value is None:
        if default is not None:
            raise TypeError(f"{name} must be of type {kind}, got nothing; its default is {default!r}.")
        return None
    if kind == "list of str":
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise TypeError(f"{name} must be a text or a list of texts, got {value!r}. In YAML put numbers in quotes.")
        return value
    if value == AUTO and kind.endswith(f"'{AUTO}'"):
        return value
    kind = kind.split()[0]
    if isinstance(value, bool) != (kind == "bool") or not isinstance(value, _TYPES[kind]):
        raise TypeError(f"{name} must be of type {kind}, got {value!r}.")
    # Beyond the range of floats a whole number is as infinite as infinity.
    if kind == "float" and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value!r}.")
    return float(value) if kind == "float" else value
