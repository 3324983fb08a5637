"""What a command line says of the pairs of golden noise, and of the network that is trained on them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hfnoise.golden_noise_options import NOISE_NET_OPTIONS, NOISE_PAIR_OPTIONS
from hfnoise.option_types import check_least, check_option_types
from hfnoise.options import Option, option_default, option_help

ARCHITECTURES = {"noise-prompt-net": "NoisePromptNet", "npnet": "NPNet"}
_DTYPES = (None, "float32", "float16", "bfloat16")
_COUNTS = (
    "max_prompts", "noises_per_prompt", "pair_batch_size", "num_inference_steps", "height", "width", "eval_images"
)  # fmt: skip


def _field(options: tuple[Option, ...], name: str) -> Any:
    return field(default=option_default(options, name), metadata={"help": option_help(options, name)})


@dataclass
class GoldenNoiseScriptArguments:
    """The pipeline, the prompts, the verifier and the network: `hfnoise golden-noise --help` describes the options.

    Args:
        model_name_or_path, model_revision, variant, dtype (`str`, *optional*): of the pipeline.
        prompts_file (`str`, *optional*): or a dataset of prompts:
        dataset_name, dataset_config (`str`, *optional*), dataset_train_split (`str`, defaults to `"train"`),
            caption_column (`str`, defaults to `"text"`): where its prompts are.
        max_prompts (`int`, *optional*), noises_per_prompt (`int`, *optional*, 1): how many pairs.
        pairs_dir (`str`, *optional*), pair_batch_size (`int`, defaults to `8`): of the collection.
        redenoise_steps (`int`, *optional*), redenoise_strength (`float`, *optional*): of [`ReDenoise`].
        num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*), height (`int`, *optional*),
            width (`int`, *optional*): of images.
        verifier, verifier_processor (`str`, *optional*): what judges them.
        validation_size (`float`, *optional*, 0.1), eval_images (`int`, *optional*, 64): of the evaluation.
        architecture (`str`, *optional*, `"noise-prompt-net"`), npnet (`str`, *optional*), net_options (`dict` or
            `str`, *optional*): the network.

    Raises:
        ValueError: for a value out of range, and for options that exclude each other.

    Example:
        >>> from hfnoise.trainers.golden_noise_arguments import GoldenNoiseScriptArguments
        >>> options = {"dataset_name": "hfnoise:digits", "net_options": '{"map_size": 8}'}
        >>> GoldenNoiseScriptArguments("digits", **options).net_options
        {'map_size': 8}
    """

    model_name_or_path: str | None = _field(NOISE_PAIR_OPTIONS, "model_name_or_path")
    model_revision: str | None = _field(NOISE_PAIR_OPTIONS, "model_revision")
    variant: str | None = _field(NOISE_PAIR_OPTIONS, "variant")
    dtype: str | None = _field(NOISE_PAIR_OPTIONS, "dtype")
    prompts_file: str | None = _field(NOISE_PAIR_OPTIONS, "prompts_file")
    dataset_name: str | None = _field(NOISE_PAIR_OPTIONS, "dataset_name")
    dataset_config: str | None = _field(NOISE_PAIR_OPTIONS, "dataset_config")
    dataset_train_split: str = _field(NOISE_PAIR_OPTIONS, "dataset_train_split")
    caption_column: str = _field(NOISE_PAIR_OPTIONS, "caption_column")
    max_prompts: int | None = _field(NOISE_PAIR_OPTIONS, "max_prompts")
    noises_per_prompt: int | None = _field(NOISE_PAIR_OPTIONS, "noises_per_prompt")
    pairs_dir: str | None = _field(NOISE_PAIR_OPTIONS, "pairs_dir")
    pair_batch_size: int = _field(NOISE_PAIR_OPTIONS, "pair_batch_size")
    redenoise_steps: int | None = _field(NOISE_PAIR_OPTIONS, "redenoise_steps")
    redenoise_strength: float | None = _field(NOISE_PAIR_OPTIONS, "redenoise_strength")
    num_inference_steps: int | None = _field(NOISE_PAIR_OPTIONS, "num_inference_steps")
    guidance_scale: float | None = _field(NOISE_PAIR_OPTIONS, "guidance_scale")
    height: int | None = _field(NOISE_PAIR_OPTIONS, "height")
    width: int | None = _field(NOISE_PAIR_OPTIONS, "width")
    verifier: str | None = _field(NOISE_PAIR_OPTIONS, "verifier")
    verifier_processor: str | None = _field(NOISE_PAIR_OPTIONS, "verifier_processor")
    validation_size: float | None = _field(NOISE_PAIR_OPTIONS, "validation_size")
    eval_images: int | None = _field(NOISE_PAIR_OPTIONS, "eval_images")
    architecture: str | None = _field(NOISE_NET_OPTIONS, "architecture")
    npnet: str | None = _field(NOISE_NET_OPTIONS, "npnet")
    net_options: dict | str | None = _field(NOISE_NET_OPTIONS, "net_options")

    def __post_init__(self) -> None:
        check_option_types(self, GoldenNoiseScriptArguments)
        if (self.prompts_file is None) == (self.dataset_name is None):
            raise ValueError(
                "give either prompts_file, a text file with a prompt on each line, or dataset_name, a Hub id, a local "
                "file or folder, or hfnoise:digits."
            )
        check_least(self, 1, *_COUNTS)
        # Two points of a schedule make a step.
        check_least(self, 2, "redenoise_steps")
        check_least(self, 0, "guidance_scale")
        if self.validation_size is not None and not 0 <= self.validation_size < 1:
            raise ValueError(f"validation_size is {self.validation_size}; give a share in [0, 1).")
        if self.redenoise_strength is not None:
            if not self.redenoise_strength > 0:
                raise ValueError(f"redenoise_strength is {self.redenoise_strength}; give a number above 0.")
            if self.redenoise_steps is not None:
                raise ValueError("redenoise_steps and redenoise_strength both set the size of the step: give one.")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; choose {', '.join(map(str, _DTYPES[1:]))}.")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height and width go together, got {self.height} and {self.width}.")
        if self.verifier_processor and not self.verifier:
            raise ValueError("verifier_processor is of --verifier, which is not given.")
        if self.eval_images is not None and not self.verifier:
            raise ValueError("eval_images are judged by --verifier, which is not given.")
        if self.architecture is not None and self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {self.architecture!r}; choose {' or '.join(ARCHITECTURES)}.")
        if isinstance(self.net_options, str):
            try:
                self.net_options = json.loads(self.net_options)
            except ValueError as error:
                raise ValueError(f"net_options {self.net_options!r} is no JSON: {error}.") from None
        if self.net_options is not None and not isinstance(self.net_options, dict):
            raise ValueError(f"net_options is {self.net_options!r}; give a mapping, such as {{'map_size': 8}}.")
        for name in ("net_options", "architecture"):
            if self.npnet and getattr(self, name):
                raise ValueError(f"npnet is {self.npnet!r}, whose {name} is its own: leave --{name} out.")

    @property
    def call(self) -> dict[str, Any]:
        """The options of the pipeline's call that are given."""
        names = ("num_inference_steps", "guidance_scale", "height", "width")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def net_class(self) -> str:
        """The public name of the class of a new network."""
        return ARCHITECTURES[self.architecture or "noise-prompt-net"]
