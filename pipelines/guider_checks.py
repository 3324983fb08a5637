"""Whether a pipeline can take a guider; told when it is given one, not in mid-run."""

from __future__ import annotations

import inspect
from typing import Any

from hfnoise.pipelines.guider_base import UpdateGuidance
from hfnoise.pipelines.pipeline_layouts import layout_of


def check_guider(pipeline_class: type, guider: Any) -> None:
    """Refuse a guider that a pipeline cannot follow.

    Raises:
        TypeError: if it is no guider of hfnoise.
        ValueError: if the pipeline has no unconditional branch, works in a way that cannot be guided, or is unknown;
            if the guider has options that the pipeline cannot take.

    Example:
        >>> from diffusers import LatentConsistencyModelPipeline
        >>> from hfnoise.pipelines import AdaptiveGuidance
        >>> from hfnoise.pipelines.guider_checks import check_guider
        >>> check_guider(LatentConsistencyModelPipeline, AdaptiveGuidance())
        Traceback (most recent call last):
        ...
        ValueError: LatentConsistencyModelPipeline has no unconditional prediction...
    """
    if guider is None:
        return
    name = pipeline_class.__name__.removeprefix("Guided")
    if not isinstance(guider, UpdateGuidance):
        raise TypeError(
            f"{name} takes a guider of hfnoise (AdaptiveGuidance, ProjectedGuidance, LinearGuidance), got "
            f"{type(guider).__name__}. Those of diffusers work in its modular pipelines only."
        )
    layout = layout_of(pipeline_class)
    if layout is None:
        raise ValueError(
            f"it is not known how {name} calls its denoiser. Say so: hfnoise.pipelines.pipeline_layouts.LAYOUTS"
            f"[{name!r}] = PipelineLayout('batched'), or 'two_calls'."
        )
    if layout.kind == "refused":
        raise ValueError(f"{name} cannot take a guider: {layout.reason}")
    if layout.kind == "unguided":
        raise ValueError(
            f"{name} has no unconditional prediction: its guidance is distilled, or it has none. A guider would do "
            "nothing: use it without."
        )
    if layout.kind == "three_branches" and any(stage._changes_update for stage in guider.stages):
        raise ValueError(
            f"{name} has two guidance scales, of text and image, for which APG and linear estimates are not defined. "
            "Use AdaptiveGuidance() without inner guider."
        )
    if not layout.x0_from_scheduler and any(stage._needs_input for stage in guider.stages):
        raise ValueError(
            f"x0 does not follow from the scheduler of {name} (it preconditions, or its tokens stand at several noise "
            "levels). Use space='model'."
        )
    if guider.use_original_formulation:
        raise ValueError(
            f"use_original_formulation=True does not work in {name}, whose own formula is cond + (w - 1) update: "
            "leave it at False, with a guidance_scale larger by 1."
        )
    parameters = inspect.signature(pipeline_class.__call__).parameters
    if guider.guidance_rescale and "guidance_rescale" not in parameters:
        raise ValueError(
            f"{name} has no guidance_rescale, and the guider has {guider.guidance_rescale}. Leave it at 0."
        )
