"""Whether a pipeline can take a guider; told when it is given one, not in mid-run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from diffusers.guiders import BaseGuidance

from hfnoise.pipelines.guider_base import UpdateGuidance
from hfnoise.pipelines.guider_options import described
from hfnoise.pipelines.pipeline_layouts import layout_of
from hfnoise.pipelines.projected_guider import ProjectedGuidance

logger = logging.getLogger(__name__)


def takes_guider(pipeline_class: type) -> bool:
    """Return whether a pipeline of diffusers has a guider among its components, and calls it itself.

    Example:
        >>> from diffusers import HunyuanVideo15Pipeline
        >>> from hfnoise.pipelines.guider_checks import takes_guider
        >>> takes_guider(HunyuanVideo15Pipeline)
        True
    """
    layout = layout_of(pipeline_class)
    return layout is not None and layout.kind == "native"


def own_scale(pipe: Any, guider: UpdateGuidance) -> float:
    """Return the scale of a guider in a pipeline that takes one itself: what it was given, or the pipeline's own."""
    scale = pipe.__dict__.get("_own_guidance_scale")
    return guider.guidance_scale if guider.asks_for_scale or scale is None else float(scale)


def check_guider(pipeline_class: type, guider: Any) -> None:
    """Refuse a guider that a pipeline cannot follow.

    Args:
        pipeline_class (`type`): of diffusers, guided or not.
        guider: what was given; `None` is none.

    Raises:
        TypeError: if it is no guider of hfnoise; of diffusers only where the pipeline takes a guider itself.
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
    if takes_guider(pipeline_class):
        if not isinstance(guider, BaseGuidance):
            raise TypeError(f"{name} takes a guider of hfnoise or diffusers, got {described(guider)}.")
        return
    if not isinstance(guider, UpdateGuidance):
        raise TypeError(
            f"{name} takes a guider of hfnoise (AdaptiveGuidance, ProjectedGuidance, LinearGuidance), got "
            f"{described(guider)}. Those of diffusers work in its modular pipelines only."
        )
    layout = layout_of(pipeline_class)
    if layout is None:
        raise ValueError(
            f"it is not known how {name} calls its denoiser. Say so: from hfnoise.pipelines.pipeline_layouts import "
            f"LAYOUTS, PipelineLayout; LAYOUTS[{name!r}] = PipelineLayout('batched'), or "
            "PipelineLayout('two_calls', uncond_call='order'), with denoisers=('transformer',) if that is its name."
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
    if guider.guidance_rescale and "guidance_rescale" not in call_parameters(pipeline_class):
        raise ValueError(
            f"{name} has no guidance_rescale, and the guider has {guider.guidance_rescale}. Leave it at 0."
        )


def call_parameters(pipeline_class: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a pipeline's call, also those that a subclass hands on as `**kwargs`.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from hfnoise.pipelines.guider_checks import call_parameters
        >>> class MyPipeline(StableDiffusionPipeline):
        ...     def __call__(self, *args, **kwargs):
        ...         return super().__call__(*args, **kwargs)
        >>> call_parameters(MyPipeline)["guidance_scale"].default
        7.5
    """
    found: dict[str, inspect.Parameter] = {}
    for base in pipeline_class.__mro__:
        if "__call__" in base.__dict__:
            for name, parameter in inspect.signature(base.__dict__["__call__"]).parameters.items():
                found.setdefault(name, parameter)
    return found


def check_run(pipe: Any, guider: UpdateGuidance, given: Mapping[str, Any]) -> None:
    """Refuse what only the components and the arguments of a call tell; say what the pipeline will undo.

    Args:
        pipe: the pipeline.
        guider ([`UpdateGuidance`]): of this call.
        given (`Mapping`): the arguments of the call.

    Raises:
        ValueError: if the denoiser is none of the pipeline's components, or x0 would be wrong.
    """
    layout = layout_of(type(pipe))
    if layout is not None and all(getattr(pipe, name, None) is None for name in layout.denoisers):
        raise ValueError(
            f"{type(pipe).__name__.removeprefix('Guided')} has no {' or '.join(layout.denoisers)}, which its layout "
            f"says it calls: give denoisers=, the names of what it does, of {', '.join(sorted(pipe.components))}."
        )
    if (
        layout is not None
        and layout.rescaled
        and any(isinstance(stage, ProjectedGuidance) and not stage._is_neutral for stage in guider.stages)
    ):
        logger.warning(
            "%s brings what is guided to the norm of the conditional prediction afterwards, unless told otherwise: of "
            "APG the direction is left, not the size.",
            type(pipe).__name__.removeprefix("Guided"),
        )
    # Wan 2.2 TI2V: where there is an image its frame stands at timestep 0, in the middle of the others.
    if pipe.config.get("expand_timesteps") and given.get("image") is not None:
        if any(stage._needs_input for stage in guider.stages):
            name = type(pipe).__name__.removeprefix("Guided")
            raise ValueError(
                f"{name} with expand_timesteps=True gives the frame of the image another noise level than the others, "
                "so that x0 does not follow from the scheduler. Use space='model'."
            )
