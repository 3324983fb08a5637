"""Any pipeline with Adaptive Projected Guidance (APG) in one line."""

from __future__ import annotations

from hfnoise.pipelines.guidance_presets import GuidancePreset
from hfnoise.pipelines.projected_guider import ProjectedGuidance


class ProjectedGuidancePipeline(GuidancePreset):
    """[`AutoGuidedPipeline`] with [`ProjectedGuidance`]: strong guidance without oversaturation.

    APG (arXiv 2410.02416). The guider is the one given, or the saved one if there is a [`ProjectedGuidance`] in it, or
    else `ProjectedGuidance()`. What is returned is the guided class of the model at hand.

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
