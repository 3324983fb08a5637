"""Differential privacy: accounting and calibration, per-unit gradients, clipping, keyed noise, audit, tuning."""

from hfnoise.privacy.accounting import Mechanism, composed_epsilon, compute_epsilon
from hfnoise.privacy.clipping import ClippedSum, clip_per_unit
from hfnoise.privacy.gradient_recorder import UncoveredParametersError, UnitGradientRecorder
from hfnoise.privacy.keyed_random import KeyedRandom
from hfnoise.privacy.sampling import PoissonSampler

__all__ = [
    "ClippedSum",
    "KeyedRandom",
    "Mechanism",
    "PoissonSampler",
    "UncoveredParametersError",
    "UnitGradientRecorder",
    "clip_per_unit",
    "composed_epsilon",
    "compute_epsilon",
]
