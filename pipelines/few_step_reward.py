"""A reward of noise that can be differentiated: through the sampler, the decoder and the verifier."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hfnoise.latents import pack_latents
from hfnoise.pipelines.guided import guided_class
from hfnoise.pipelines.guided_saving import stock_class
from hfnoise.pipelines.side_run import guided_side_pipeline, per_prompt
from hfnoise.pipelines.verifiers import Verifier, check_verifier, verified

# Of the rows of PromptRows: which prompt a sample has.
PROMPT_INDEX = "prompt_index"


def few_step_reward(
    pipe: Any, verifier: Verifier, prompts: Sequence[str], **call: Any
) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """Return the reward of `loss="reward"` of [`NoisePromptTrainer`]: what a verifier says of the images of noise.

    For models of a few steps (LCM, Turbo, Lightning): memory grows with the steps, since all of them are kept for the
    gradient; `pipe.unet.enable_gradient_checkpointing()` helps. The pipeline's own call is made, with its guider and
    without the `torch.no_grad` around it; its weights are frozen. What it has in the slot `initial_noise` is left out:
    the noise of the network under training takes its place.

    Args:
        pipe (`DiffusionPipeline`): without a safety checker, which cannot be differentiated.
        verifier (`Callable`): differentiable, of images `(batch, channels, height, width)` in [0, 1] and prompts.
        prompts (sequence of `str`): those of [`PromptRows`], in the same order; repetitions do not matter.
        **call: of the pipeline's call, such as `num_inference_steps=1`, `guidance_scale=1.0`; a negative prompt is
            that of all prompts.

    Raises:
        TypeError: if the verifier cannot be called.
        ValueError: if the pipeline has a safety checker, or `call` sets what is set here.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.few_step_reward import few_step_reward
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> reward = few_step_reward(
        ...     new_digits_pipeline(width=8), lambda images, prompts: images.mean((1, 2, 3)), ["the digit seven"],
        ...     num_inference_steps=1, guidance_scale=1.0,
        ... )
        >>> noise = torch.randn(1, 4, 8, 8, requires_grad=True)
        >>> reward(noise, {"prompt_index": torch.tensor([0])}).requires_grad
        True
    """
    check_verifier(verifier)
    if getattr(pipe, "safety_checker", None) is not None:
        raise ValueError(
            f"{type(pipe).__name__} has a safety checker, through which there is no gradient: load it with "
            "safety_checker=None for training."
        )
    given = sorted(set(call) & {"prompt", "latents", "output_type", "return_dict"})
    if given:
        raise ValueError(f"{given} are set by the reward itself: leave them out.")
    distinct = list(dict.fromkeys(prompts))
    side = guided_side_pipeline(pipe, None)
    kind = guided_class(with_gradient(stock_class(type(pipe))))
    side.__class__ = kind
    for part in side.components.values():
        if hasattr(part, "requires_grad_"):
            part.requires_grad_(False)

    def reward(noise: Tensor, columns: dict[str, Tensor]) -> Tensor:
        if PROMPT_INDEX not in columns:
            raise ValueError(
                f"the rows have no column {PROMPT_INDEX}, by which the verifier is told the prompts: make them with "
                "hfnoise.trainers.noise_prompt_rows.PromptRows(pipe, prompts, shape)."
            )
        chosen = [distinct[index] for index in columns[PROMPT_INDEX].tolist()]
        dtype = (getattr(side, "unet", None) or side.transformer).dtype
        latents = (pack_latents(noise) if hasattr(kind, "_pack_latents") else noise).to(dtype)
        images = side(prompt=chosen, latents=latents, output_type="pt", **per_prompt(call, len(chosen))).images
        return verified(verifier, images, chosen)

    return reward


# Bounded: diffusers makes the class of a custom pipeline anew whenever it loads one.
@functools.lru_cache(maxsize=8)
def with_gradient(pipeline_class: Any) -> Any:
    """Return a pipeline class whose call can be differentiated: without the `torch.no_grad` around it.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from hfnoise.pipelines.few_step_reward import with_gradient
        >>> issubclass(with_gradient(StableDiffusionPipeline), StableDiffusionPipeline)
        True
    """
    members = {"__call__": inspect.unwrap(pipeline_class.__call__), "__module__": pipeline_class.__module__}
    return type(pipeline_class.__name__, (pipeline_class,), members)
