"""Diffusion guidance: the cosine test of Adaptive Guidance, APG, CFG-Zero*, linear estimates of the update.

Everything here is arithmetic on torch tensors; the guiders that use it are in `hfnoise.pipelines`.
"""

from hfnoise.guidance.cosine import cosine_similarity
from hfnoise.guidance.denoising_point import PREDICTION_TYPES, SPACES, DenoisingPoint
from hfnoise.guidance.linear_coefficients import (
    CoefficientMismatchError,
    EstimateKey,
    LinearCoefficients,
    schedule_digest,
)
from hfnoise.guidance.linear_estimate import POLICIES, UpdateHistory, evaluated_steps, fit_linear_coefficients
from hfnoise.guidance.projected import MomentumState, projected_output_update, projected_update
from hfnoise.guidance.zero_star import zero_star_scale

__all__ = [
    "POLICIES",
    "PREDICTION_TYPES",
    "SPACES",
    "CoefficientMismatchError",
    "DenoisingPoint",
    "EstimateKey",
    "LinearCoefficients",
    "MomentumState",
    "UpdateHistory",
    "cosine_similarity",
    "evaluated_steps",
    "fit_linear_coefficients",
    "projected_output_update",
    "projected_update",
    "schedule_digest",
    "zero_star_scale",
]
