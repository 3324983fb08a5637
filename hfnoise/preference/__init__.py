"""Preference learning from noisy labels: pair losses, batch weights, flip rates, gradient mixing, CHES.

Everything here is arithmetic on torch tensors; the Trainers that use it are in `hfnoise.trainers`. `score_dataset`,
which needs one of them, is imported when it is first used.
"""

from typing import Any

from hfnoise.preference.ches import ches_scores, filter_by_ches
from hfnoise.preference.corruption import flip_labels
from hfnoise.preference.dr_dpo import dr_dpo_value, dr_dpo_weights
from hfnoise.preference.flip_rate import FlipRateEstimate, estimate_flip_rate, posterior_flip
from hfnoise.preference.pair_loss_table import PairContext, pair_loss, pair_loss_names, register_pair_loss
from hfnoise.preference.trace_alpha import TraceAlpha, optimal_trace_alpha

__all__ = [
    "FlipRateEstimate",
    "PairContext",
    "TraceAlpha",
    "ches_scores",
    "dr_dpo_value",
    "dr_dpo_weights",
    "estimate_flip_rate",
    "filter_by_ches",
    "flip_labels",
    "optimal_trace_alpha",
    "pair_loss",
    "pair_loss_names",
    "posterior_flip",
    "register_pair_loss",
]


def __getattr__(name: str) -> Any:
    if name == "score_dataset":  # for those who look for it beside `filter_by_ches`; the core imports no Trainer
        import hfnoise

        return hfnoise.score_dataset
    raise AttributeError(f"module 'hfnoise.preference' has no attribute {name!r}")
