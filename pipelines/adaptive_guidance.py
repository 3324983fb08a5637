"""Any pipeline with Adaptive Guidance in one line."""

from __future__ import annotations

from hfnoise.pipelines.adaptive_guider import AdaptiveGuidance
from hfnoise.pipelines.guidance_presets import GuidancePreset


class AdaptiveGuidancePipeline(GuidancePreset):
    """[`AutoGuidedPipeline`] with [`AdaptiveGuidance`]: no unconditional evaluations once a sample has converged.

    Adaptive Guidance (arXiv 2312.12487). The guider is the one given, or the saved one if there is an
    [`AdaptiveGuidance`] in it, or else `AdaptiveGuidance()`. What is returned is the guided class of the model.

    Example:
        >>> from hfnoise.pipelines import AdaptiveGuidance, AdaptiveGuidancePipeline
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe = AdaptiveGuidancePipeline.from_pipe(
        ...     new_digits_pipeline(width=8), guider=AdaptiveGuidance(threshold=0.99)
        ... )
        >>> type(pipe).__name__, pipe.guider.threshold
        ('GuidedStableDiffusionPipeline', 0.99)
    """

    guider_class = AdaptiveGuidance
