"""Where sampling starts, and the noise that diffusion models are trained on: arithmetic on torch tensors.

The trainers and pipelines that use it are in `hfnoise.trainers` and `hfnoise.pipelines`.
"""

from hfnoise.latents.brightness import brightness_estimate
from hfnoise.latents.loss_weighting import (
    DebiasWeighting,
    LossWeighting,
    MinSNRWeighting,
    P2Weighting,
    UniformWeighting,
)
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
    "DebiasWeighting",
    "LossWeighting",
    "MinSNRWeighting",
    "P2Weighting",
    "ResidualStatistics",
    "UniformWeighting",
    "brightness_estimate",
    "estimated_x0",
    "guided_estimate",
    "mixed_noise",
    "one_more_step",
]
