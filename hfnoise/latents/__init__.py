"""Where sampling starts: One More Step, the terminal prior, brightness; arithmetic on torch tensors.

The members of the slot `initial_noise` that use it are in `hfnoise.pipelines`.
"""

from hfnoise.latents.brightness import brightness_estimate
from hfnoise.latents.residuals import ResidualStatistics
from hfnoise.latents.start_step import (
    COMPATS,
    ESTIMATE_TYPES,
    GUIDANCE_MODES,
    estimated_x0,
    guided_estimate,
    mixed_noise,
    one_more_step,
)

__all__ = [
    "COMPATS",
    "ESTIMATE_TYPES",
    "GUIDANCE_MODES",
    "ResidualStatistics",
    "brightness_estimate",
    "estimated_x0",
    "guided_estimate",
    "mixed_noise",
    "one_more_step",
]
