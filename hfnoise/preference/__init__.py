"""Preference learning from noisy labels: pair losses, flip-rate estimation, label corruption.

Everything here is arithmetic on torch tensors; the Trainers that use it are in `hfnoise.trainers`.
"""

from hfnoise.preference.corruption import flip_labels
from hfnoise.preference.flip_rate import FlipRateEstimate, estimate_flip_rate, posterior_flip
from hfnoise.preference.pair_loss_table import PairContext, pair_loss, pair_loss_names, register_pair_loss

__all__ = [
    "FlipRateEstimate",
    "PairContext",
    "estimate_flip_rate",
    "flip_labels",
    "pair_loss",
    "pair_loss_names",
    "posterior_flip",
    "register_pair_loss",
]
