"""Any pipeline with Adaptive Projected Guidance (APG) in one line."""

from __future__ import annotations

from typing import Any, ClassVar

from hfnoise.pipelines.guidance_presets import GuidancePreset
from hfnoise.pipelines.projected_guider import ProjectedGuidance


class ProjectedGuidancePipeline(GuidancePreset):
    """[`AutoGuidedPipeline`] with [`ProjectedGuidance`]: strong guidance without oversaturation.

    APG (arXiv 2410.02416). The guider is the one given, or the saved one if there is a [`ProjectedGuidance`] in it, or
    else all three parts of the paper, with its settings for SDXL scaled to the model:
    `ProjectedGuidance(norm_threshold="auto", momentum=-0.5)`. What is returned is the guided class of the model.

    Example:
        >>> from hfnoise.pipelines import ProjectedGuidance, ProjectedGuidancePipeline
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe = ProjectedGuidancePipeline.from_pipe(
        ...     new_digits_pipeline(width=8), guider=ProjectedGuidance(guidance_scale=15.0)
        ... )
        >>> type(pipe).__name__, pipe.guider.guidance_scale
        ('GuidedStableDiffusionPipeline', 15.0)
    """

    guider_class = ProjectedGuidance
    # The guider itself defaults to the projection alone, whose norm and momentum depend on the model.
    guider_options: ClassVar[dict[str, Any]] = {"norm_threshold": "auto", "momentum": -0.5}
