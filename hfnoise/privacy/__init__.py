"""Differential privacy: per-unit gradients and their clipping.

Everything here is arithmetic on torch tensors; the Trainers that use it are in `hfnoise.trainers`.
"""

from hfnoise.privacy.clipping import ClippedSum, clip_per_unit
from hfnoise.privacy.gradient_recorder import UncoveredParametersError, UnitGradientRecorder
from hfnoise.privacy.per_unit_gradients import per_unit_gradients

__all__ = ["ClippedSum", "UncoveredParametersError", "UnitGradientRecorder", "clip_per_unit", "per_unit_gradients"]
