"""One More Step as an initial noise: the mean of the images of a prompt, before the first step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfnoise.latents import ESTIMATE_TYPES, estimated_x0, guided_estimate, mixed_noise
from hfnoise.latents.hf_time_free_unet import module_output, module_residuals
from hfnoise.latents.start_step import check_compat, check_guidance
from hfnoise.pipelines.start_context import StartContext, check_words
from hfnoise.pipelines.start_estimate import Estimate, StartEstimate
from hfnoise.pipelines.start_text import WORDS_OR_STATES, StartText, check_width, encodes_prompts, one_or_the_other
from hfnoise.pipelines.terminal_prior import TerminalPrior, check_scale


class OneMoreStep(StartEstimate):
    """Starts where the base model was trained to start: at the mean of the images of the prompt, with noise on it.

    One More Step (arXiv 2311.15744). A model of the Stable Diffusion family never saw noise without any signal in
    training, reads the brightness of the image from the signal, and is given none: it draws everything in mid
    brightness. A small network that needs no time puts it right in one evaluation, for all models with the same VAE.
    The base model is not changed, and its seed keeps its composition.

    Departures from the official code: the noise is multiplied by its standard deviation and not by its variance; the
    scheduler's own `add_noise` makes the start, where Euler and its kin were given the wrong scale; the network sees
    unit noise with every scheduler; guidance is off at `guidance_scale=1`, at half the cost; the noise is kept
    (`eta=0`). `compat="official"` is the official arithmetic, within the scheduler's scale.

    Args:
        module (`torch.nn.Module`): [`TimeFreeUNet2DConditionModel`], or a stock UNet2DConditionModel.
        eta (`float`, defaults to `0.0`): in [0, 1], share of fresh noise.
        guidance_scale (`float`, *optional*, defaults to `1.0`): of the estimate; 1 is one evaluation without the
            negative prompt, `None` the scale of the call where that is above 1. More exaggerates brightness and
            colour.
        guidance_mode (`str`, defaults to `"plain"`): or `"normalized"`, of SingDiffusion.
        prediction_type (`str`, defaults to `"v"`): what the module puts out, minus the image; or `"sample"`, the
            image, of SingDiffusion.
        prompt, negative_prompt (`str` or list of `str`, *optional*): instead of the prompt of the call, and of "".
        prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(1 or batch, tokens, width)`, *optional*):
            instead of encoded words.
        text_encoder, tokenizer (*optional*): of the module, if it does not read the embeddings of the pipeline.
        terminal_prior ([`TerminalPrior`], *optional*): the module's own by default, if it carries one and none
            follows in a chain; `False` for none.
        scale (`float`, defaults to `1.0`): of the estimate; 0 is off, the stock run to the bit.
        compat (`str`, *optional*): `"official"`.

    Raises:
        TypeError, ValueError: if an option is out of its range or half of a pair.

    Example:
        >>> from hfnoise.pipelines import OneMoreStep, guide
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe = new_digits_pipeline(width=8)
        >>> module = new_digits_pipeline(width=8, seed=1).unet
        >>> with guide(pipe, initial_noise=OneMoreStep(module)):
        ...     image = pipe("the digit seven", num_inference_steps=4).images[0]
    """

    subfolder: ClassVar[str | None] = "oms_module"

    def __init__(
        self,
        module: nn.Module,
        *,
        eta: float = 0.0,
        guidance_scale: float | None = 1.0,
        guidance_mode: str = "plain",
        prediction_type: str = "v",
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        terminal_prior: TerminalPrior | bool | None = None,
        scale: float = 1.0,
        compat: str | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module must be the network of One More Step, got {type(module).__name__}. To load one: "
                "OneMoreStep.from_pretrained(folder_or_repository)."
            )
        self.module, self.eta = module, eta
        self.guidance_scale, self.guidance_mode, self.prediction_type = guidance_scale, guidance_mode, prediction_type
        self.prompt, self.negative_prompt = prompt, negative_prompt
        self.prompt_embeds, self.negative_prompt_embeds = prompt_embeds, negative_prompt_embeds
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.terminal_prior, self.scale, self.compat = terminal_prior, scale, compat
        self._check()

    def _check(self) -> None:
        # Again at every call: the options are plain attributes, to be changed between calls.
        if (self.text_encoder is None) != (self.tokenizer is None):
            raise ValueError("text_encoder and tokenizer go together: give both, or none.")
        if not (self.terminal_prior in (None, False) or isinstance(self.terminal_prior, TerminalPrior)):
            raise TypeError(f"terminal_prior must be a TerminalPrior, False or None, got {self.terminal_prior!r}.")
        check_compat(self.compat, self.eta)
        check_scale(self.scale)
        check_guidance(1.0 if self.guidance_scale is None else self.guidance_scale, self.guidance_mode)
        if self.prediction_type not in ESTIMATE_TYPES:
            raise ValueError(f"prediction_type must be one of {ESTIMATE_TYPES}, got {self.prediction_type!r}.")
        for name, _ in WORDS_OR_STATES:
            check_words(getattr(self, name), name)
        for words, name in WORDS_OR_STATES:
            states = getattr(self, name)
            if states is not None and getattr(self, words) is not None:
                raise ValueError(f"{words} and {name} are both given, and one would be left out: give one of them.")
            if states is not None and not (isinstance(states, Tensor) and states.dim() == 3):
                found = f"a tensor of shape {tuple(states.shape)}" if isinstance(states, Tensor) else f"{states!r:.80}"
                raise ValueError(f"{name} must be a tensor of shape (1 or batch, tokens, width), got {found}.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> OneMoreStep:
        """Return what `save_pretrained` wrote, or what an official repository holds and points to.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub repository: of a module, of this
                object, or of a pipeline with either in `oms_module`.
            subfolder (`str`, *optional*): found by default.
            kwargs: `variant` (`"fp16"` for official repositories), `dtype` or `torch_dtype`, `revision`, `token`, ...;
                and options that replace saved ones, such as `eta`, or `text_encoder`.

        Raises:
            ValueError: if there is no module, or an option is unknown or cannot be used; the message names the file.
            OSError: if a text encoder that the repository points to is gone.
        """
        from hfnoise.pipelines.one_more_step_files import load_one_more_step

        return load_one_more_step(cls, pretrained_model_name_or_path, subfolder, kwargs)

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write the module, its options, and its own embeddings, text encoder and tokenizer, into one folder.

        Args:
            save_directory (`str` or `os.PathLike`): made if need be; with a pipeline it is `oms_module`.
            kwargs: of the module's own `save_pretrained`; `variant` and `max_shard_size` of the text encoder's too.

        Raises:
            TypeError: if the module is no model of diffusers.
            ValueError: if `save_directory` is a file, or for `push_to_hub`, which would push the module alone.
        """
        from hfnoise.pipelines.one_more_step_files import save_one_more_step

        save_one_more_step(self, save_directory, kwargs)

    def to_config(self) -> dict[str, Any]:
        """Return the options that `one_more_step.json` holds, without networks and embeddings."""
        from hfnoise.pipelines.one_more_step_files import one_more_step_options

        return one_more_step_options(self)

    def to(self, *args: Any, **kwargs: Any) -> OneMoreStep:
        """Move or cast the networks, as `torch.nn.Module.to`; they follow the latents to another device anyway."""
        self.module.to(*args, **kwargs)
        if self.text_encoder is not None:
            self.text_encoder.to(*args, **kwargs)
        return self

    def with_options(self, **options: Any) -> OneMoreStep:
        """Return the same with other options, and this one as it is; the networks are not copied.

        Args:
            options: any but `module`. Words take the place of embeddings of the same prompt, and the other way round.

        Raises:
            TypeError, ValueError: if there is no such option, or it is out of its range.
        """
        known = [name for name in inspect.signature(OneMoreStep).parameters if name != "module"]
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(f"OneMoreStep has no option {', '.join(unknown)}; it has {', '.join(known)}.")
        changed = copy.copy(self)
        for name, value in one_or_the_other(options).items():
            setattr(changed, name, value)
        changed._check()
        return changed

    @property
    def prior(self) -> TerminalPrior | None:
        """The terminal prior in use: the given one, or else the module's."""
        if self.terminal_prior is not None:
            return self.terminal_prior or None  # type: ignore[return-value]
        statistics = module_residuals(self.module)
        return None if statistics is None else TerminalPrior(statistics)

    def check_pipeline(self, pipeline_class: type) -> None:
        """Raise ValueError if a pipeline never encodes a prompt and none is given here."""
        given = self.prompt_embeds is not None or self.text_encoder is not None
        if not given and not encodes_prompts(pipeline_class):
            raise ValueError(
                f"{pipeline_class.__name__.removeprefix('Guided')} has no encode_prompt to take the text from. Give "
                "OneMoreStep text_encoder= and tokenizer=, or prompt_embeds=."
            )

    def estimate(self, noise: Tensor, context: StartContext) -> Estimate:
        """Return the mean of the images of each prompt, and the noise to put on it."""
        self._check()
        if noise.dim() != 4 or noise.shape[1] != _in_channels(self.module, noise):
            raise ValueError(
                f"the module takes latents of {_in_channels(self.module, noise)} channels of images, and "
                f"{context.name} has latents of shape {tuple(noise.shape)}: it was made for another VAE."
            )
        output, evaluations = self._output(noise, context)
        x0 = estimated_x0(output, self.prediction_type)
        if not bool(torch.isfinite(x0).all()):
            raise ValueError(
                f"the module of One More Step put out NaN or infinity in {next(self.module.parameters()).dtype}. Load "
                "it in float32 or bfloat16."
            )
        exponent = 1.0
        if self.compat == "official":
            noise, exponent = context.normal(*noise.shape[1:]), 2.0
        elif self.eta:
            noise = mixed_noise(noise, self.eta, context.normal(*noise.shape[1:]))
        instead = self.terminal_prior is None and context.draws_residuals
        prior = None if instead else self.prior
        if prior is not None and not prior.is_off:
            x0 = x0 + prior.scale * prior.estimate(noise, context).x0
        return Estimate(x0, noise, evaluations, exponent)

    def _output(self, noise: Tensor, context: StartContext) -> tuple[Tensor, int]:
        text = StartText(self, context)
        module = placed(self.module, noise.device)
        # Below 1 the pipelines do not guide at all.
        scale = max(context.guidance_scale or 1.0, 1.0) if self.guidance_scale is None else self.guidance_scale
        cond = text.states()
        check_width(module, cond, context, self.text_encoder)
        if scale == 1.0:
            return _evaluate(module, noise, cond), 1
        uncond = text.negative_states()
        check_width(module, uncond, context, self.text_encoder)
        if uncond.shape == cond.shape:
            both = _evaluate(module, torch.cat([noise, noise]), torch.cat([uncond, cond]))
            first, second = both.chunk(2)
        else:
            first, second = (_evaluate(module, noise, states) for states in (uncond, cond))
        return guided_estimate(first, second, scale, self.guidance_mode), 2

    def __repr__(self) -> str:
        return f"OneMoreStep({type(self.module).__name__}, eta={self.eta}, guidance_scale={self.guidance_scale})"


def placed(module: Any, device: torch.device) -> Any:
    """Return a network on a device, moved there if nothing else (accelerate) moves it."""
    there = next(module.parameters(), torch.empty(0, device=device)).device
    if there != device and not hasattr(module, "_hf_hook"):
        module.to(device)
    return module


def _evaluate(module: Any, noise: Tensor, states: Tensor) -> Tensor:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), noise.dtype)
    with torch.no_grad():
        return module_output(module, noise.to(dtype), states.to(dtype)).float()


def _in_channels(module: Any, noise: Tensor) -> int:
    return getattr(getattr(module, "config", None), "in_channels", None) or noise.shape[1]
