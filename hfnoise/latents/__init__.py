"""Where sampling starts, and the noise that diffusion models are trained on: arithmetic on torch tensors.

The trainers and pipelines that use it are in `hfnoise.trainers` and `hfnoise.pipelines`.
"""

from hfnoise.latents.brightness import brightness_estimate
from hfnoise.latents.candidate_noise import candidate_noise, noise_seeds, numbered_seed
from hfnoise.latents.condition_noise import noised_condition
from hfnoise.latents.evaluation_budget import EvaluationBudget
from hfnoise.latents.loss_weighting import (
    DebiasWeighting,
    LossWeighting,
    MinSNRWeighting,
    P2Weighting,
    UniformWeighting,
)
from hfnoise.latents.neighbours import noise_neighbour
from hfnoise.latents.noise_level_guidance import noise_level_step, unit_norm
from hfnoise.latents.packing import pack_latents, unpack_latents
from hfnoise.latents.rank_ensemble import mean_ranks
from hfnoise.latents.redenoise import Redenoising, ddim_step
from hfnoise.latents.residuals import ResidualStatistics
from hfnoise.latents.start_prediction import start_form, start_prediction
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
    "EvaluationBudget",
    "LossWeighting",
    "MinSNRWeighting",
    "P2Weighting",
    "Redenoising",
    "ResidualStatistics",
    "UniformWeighting",
    "brightness_estimate",
    "candidate_noise",
    "ddim_step",
    "estimated_x0",
    "guided_estimate",
    "mean_ranks",
    "mixed_noise",
    "noise_level_step",
    "noise_neighbour",
    "noise_seeds",
    "noised_condition",
    "numbered_seed",
    "one_more_step",
    "pack_latents",
    "start_form",
    "start_prediction",
    "unit_norm",
    "unpack_latents",
]
