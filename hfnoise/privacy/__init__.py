"""Differential privacy: accounting and calibration, per-unit gradients, clipping, keyed noise, audit, tuning.

Everything here is arithmetic on torch tensors; the Trainers that use it are in `hfnoise.trainers`.
"""

from hfnoise.privacy.accounting import Mechanism, composed_epsilon, compute_epsilon
from hfnoise.privacy.audit import AuditEstimate, audit_scores
from hfnoise.privacy.audit_bounds import audit_epsilon_lower_bound, audit_p_value
from hfnoise.privacy.calibration import calibrate_noise_multiplier, largest_step_count
from hfnoise.privacy.clipping import ClippedSum, clip_per_unit
from hfnoise.privacy.correlated_noise import CorrelatedNoise, choose_bands
from hfnoise.privacy.gradient_recorder import UncoveredParametersError, UnitGradientRecorder
from hfnoise.privacy.keyed_random import KeyedRandom
from hfnoise.privacy.per_unit_gradients import per_unit_gradients
from hfnoise.privacy.sampling import PoissonSampler
from hfnoise.privacy.toeplitz import toeplitz_strategy

__all__ = [
    "AuditEstimate",
    "ClippedSum",
    "CorrelatedNoise",
    "KeyedRandom",
    "Mechanism",
    "PoissonSampler",
    "UncoveredParametersError",
    "UnitGradientRecorder",
    "audit_epsilon_lower_bound",
    "audit_p_value",
    "audit_scores",
    "calibrate_noise_multiplier",
    "choose_bands",
    "clip_per_unit",
    "composed_epsilon",
    "compute_epsilon",
    "largest_step_count",
    "per_unit_gradients",
    "toeplitz_strategy",
]
