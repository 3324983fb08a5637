"""Preference learning from noisy labels: pair losses, batch weights, flip rates, gradient mixing.

Everything here is arithmetic on torch tensors; the Trainers that use it are in `hfnoise.trainers`.
"""

from hfnoise.preference.corruption import flip_labels
from hfnoise.preference.dr_dpo import dr_dpo_value, dr_dpo_weights
from hfnoise.preference.flip_rate import FlipRateEstimate, estimate_flip_rate, posterior_flip
from hfnoise.preference.pair_loss_table import PairContext, pair_loss, pair_loss_names, register_pair_loss
from hfnoise.preference.trace_alpha import TraceAlpha, optimal_trace_alpha

__all__ = [
    "FlipRateEstimate",
    "PairContext",
    "TraceAlpha",
    "dr_dpo_value",
    "dr_dpo_weights",
    "estimate_flip_rate",
    "flip_labels",
    "optimal_trace_alpha",
    "pair_loss",
    "pair_loss_names",
    "posterior_flip",
    "register_pair_loss",
]
