"""A reward of noise that can be differentiated: through the sampler, the decoder and the verifier."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hfnoise.pipelines.side_run import side_pipeline
from hfnoise.pipelines.verifiers import Verifier, check_verifier, verified

# Of the rows of PromptRows: which prompt a sample has.
PROMPT_INDEX = "prompt_index"


def few_step_reward(
    pipe: Any, verifier: Verifier, prompts: Sequence[str], **call: Any
) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """Return the reward of `loss="reward"` of [`NoisePromptTrainer`]: what a verifier says of the images of noise.

    For models of a few steps (LCM, Turbo, Lightning): memory grows with the steps, since all of them are kept for the
    gradient; `pipe.unet.enable_gradient_checkpointing()` helps. The pipeline's own call is made, without the
    `torch.no_grad` around it; its weights are frozen.

    Args:
        pipe (`DiffusionPipeline`): without a safety checker, which cannot be differentiated.
        verifier (`Callable`): differentiable, of images `(batch, channels, height, width)` in [0, 1] and prompts.
        prompts (sequence of `str`): those of [`PromptRows`], in the same order; repetitions do not matter.
        **call: of the pipeline's call, such as `num_inference_steps=1`, `guidance_scale=1.0`.

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
    side = side_pipeline(pipe)
    run = inspect.unwrap(type(side).__call__)
    for part in side.components.values():
        if hasattr(part, "requires_grad_"):
            part.requires_grad_(False)

    def reward(noise: Tensor, columns: dict[str, Tensor]) -> Tensor:
        chosen = [distinct[index] for index in columns[PROMPT_INDEX].tolist()]
        dtype = next(
            getattr(side, name).dtype for name in ("unet", "transformer") if getattr(side, name, None) is not None
        )
        images = run(side, prompt=chosen, latents=noise.to(dtype), output_type="pt", **call).images
        return verified(verifier, images, chosen)

    return reward
