"""Differential privacy: per-unit gradients and their clipping.

Everything here is arithmetic on torch tensors; the Trainers that use it are in `hfnoise.trainers`.
"""

from hfnoise.privacy.clipping import ClippedSum, clip_per_unit
from hfnoise.privacy.gradient_recorder import UncoveredParametersError, UnitGradientRecorder

__all__ = ["ClippedSum", "UncoveredParametersError", "UnitGradientRecorder", "clip_per_unit"]
