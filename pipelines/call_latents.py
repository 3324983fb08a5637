"""The refined noise of a call, without the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import ModularPipeline
from torch import Tensor

from hfnoise.pipelines.initial_noise import (
    InitialNoise,
    StartState,
    cast_start,
    check_initial_noise,
    refined_state,
)
from hfnoise.pipelines.side_run import SideRunStopped, guided_side_pipeline
from hfnoise.pipelines.start_context import StartContext


def call_latents(pipe: Any, initial_noise: InitialNoise, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a call would start from, in the pipeline's dtype and of unit variance: `InitialNoise.latents`.

    The call is begun on the side, and stopped where its noise is refined.

    Args:
        pipe: of diffusers.
        initial_noise ([`InitialNoise`]): of space `"unit"`.
        args, kwargs: of the call.

    Raises:
        ValueError: if it cannot serve in this pipeline, or makes no unit noise.

    Example:
        >>> from hfnoise.pipelines import ReDenoise
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe = new_digits_pipeline(width=8)
        >>> noise = ReDenoise().latents(pipe, "the digit seven", num_inference_steps=4)
        >>> noise.shape
        torch.Size([1, 4, 8, 8])
        >>> image = pipe("the digit seven", num_inference_steps=4, latents=noise).images[0]
    """
    check_initial_noise(pipe, initial_noise)
    if isinstance(pipe, ModularPipeline):
        raise ValueError(
            f"{type(pipe).__name__} is modular: give {type(initial_noise).__name__} to hfnoise.guide, or begin with a "
            "classic pipeline of the same parts."
        )
    name = type(initial_noise).__name__
    if initial_noise.space != "unit":
        raise ValueError(
            f"{name} makes a state of the scheduler, and latents= takes noise of unit variance. Put it into the slot: "
            f"hfnoise.guide(pipe, initial_noise={name}(...))."
        )
    stop = _Stop(initial_noise)
    side = guided_side_pipeline(pipe, stop)
    # A search shows how far it is; nothing else of this call comes to a bar.
    side.__dict__["_progress_bar_config"] = dict(getattr(pipe, "_progress_bar_config", {}))
    try:
        side(*args, **kwargs)
    except SideRunStopped:
        if stop.start is not None:
            return stop.start
        raise
    raise ValueError(f"this call of {type(pipe).__name__} prepared no latents: there is no noise to refine.")


class _Stop(InitialNoise):
    """Keeps what another one makes, and ends the call."""

    def __init__(self, inner: InitialNoise) -> None:
        self.inner, self.start = inner, None

    start: Tensor | None

    def condition(self, context: StartContext) -> tuple[Any, ...]:
        changed = self.inner.condition(context)
        if changed is not context.encoded:
            raise ValueError(
                f"{type(self.inner).__name__} changes the text states of the call, which latents= cannot carry. Put "
                "it into the slot: hfnoise.guide(pipe, initial_noise=...)."
            )
        return changed

    def refine(self, unit_noise: Tensor, context: StartContext) -> StartState:
        refined = refined_state(self.inner, unit_noise, context).latents
        self.start = cast_start(self.inner, refined, unit_noise.shape, context.dtype)
        raise SideRunStopped
