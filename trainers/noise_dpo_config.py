"""Configuration of DPO with noisy labels: TRL's fields and ours, all validated in `__post_init__`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig

from hfnoise.option_types import check_option_types
from hfnoise.options import NOISE_DPO_OPTIONS, Option, option_help
from hfnoise.preference.pair_context import PairContext
from hfnoise.preference.pair_loss_table import check_flip_rate, find_pair_loss, pair_loss_names
from hfnoise.trainers.ches_capture import refuse_prefix_sharing
from hfnoise.trainers.ignored_settings import refuse_ignored_settings

# The losses inside trl.DPOTrainer. TRL keeps no list of them, so a test compares this one with the installed version.
TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# Those of them that read TRL's label_smoothing, which is the flip rate for all of them.
TRL_LOSSES_WITH_FLIP_RATE = ("robust", "exo_pair", "aot", "aot_unpaired")
# Losses that are robust without a rate; a rate given beside them only feeds metrics and reports.
_RATE_FREE_ROBUST = ("sym", "ropo", "holder")


def option_field(name: str, default: Any, options: tuple[Option, ...] = NOISE_DPO_OPTIONS) -> Any:
    """Return a dataclass field whose help is that of the option table."""
    return field(default=default, metadata={"help": option_help(options, name)})


@dataclass
class NoiseDPOConfig(DPOConfig):
    """Configuration for [`NoiseDPOTrainer`]: every field of [`~trl.DPOConfig`] and the ones below.

    `loss_type` accepts the pair losses of `hfnoise.preference.pair_loss_names()` beside TRL's own, mixed through
    `loss_weights`: `cdpo`, `forward_corrected`, `sym`, `ropo`, `holder`, and those you register.

    Args:
        flip_rate (`float`, *optional*): probability that a label is flipped, in [0, 0.5). `label_smoothing` is TRL's
            name for the same quantity; whichever is given sets both.
        flip_rate_column (`str`, *optional*): dataset column with a flip rate per pair, in [0, 0.5).
        sample_weight_column (`str`, *optional*): dataset column with a weight per pair, finite and >= 0.
        annotator_column (`str`, *optional*): dataset column that names who gave the label.
        holder_gamma (`float`, defaults to `2.0`): exponent of `holder`, above 0.
        sym_temperature (`float`, defaults to `1.0`): unit of margin of `sym`, above 0.
        ropo_alpha (`float`, defaults to `14.0`): weight of the symmetric part of `ropo`, above 0.
        robust_rescale (`bool`, defaults to `False`): multiply `robust` by (1 - 2 flip_rate).
        robust_margin_limit (`float`, *optional*): margin above which `robust` is constant.
        on_nan_log_probs (`str`, defaults to `"raise"`): `"raise"` or `"skip"`.
        drop_invalid_pairs (`bool`, defaults to `False`): drop instead of refuse pairs with identical answers and
            pairs whose prompt fills `max_length`.
        prefix_sharing (`bool`, defaults to `False`): compute the prompt of a pair once, exactly.
        compute_ches (`bool`, defaults to `False`): add the columns `ches` and `ln_ches` to the datasets, in the pass
            that computes the reference log-probabilities; needs `precompute_ref_log_probs=True`.

    Raises:
        ValueError: for any value out of range, an unknown loss, or a combination that would be silently wrong.

    Example:
        >>> from hfnoise import NoiseDPOConfig
        >>> config = NoiseDPOConfig("out", loss_type=["forward_corrected"], flip_rate=0.2, use_cpu=True, bf16=False)
        >>> config.label_smoothing
        0.2
    """

    # A string as well, for "auto" in a subclass: the command line brings strings, and argparse refuses other unions.
    flip_rate: float | str | None = option_field("flip_rate", None)
    flip_rate_column: str | None = option_field("flip_rate_column", None)
    sample_weight_column: str | None = option_field("sample_weight_column", None)
    annotator_column: str | None = option_field("annotator_column", None)
    holder_gamma: float = option_field("holder_gamma", 2.0)
    sym_temperature: float = option_field("sym_temperature", 1.0)
    ropo_alpha: float = option_field("ropo_alpha", 14.0)
    robust_rescale: bool = option_field("robust_rescale", False)
    robust_margin_limit: float | None = option_field("robust_margin_limit", None)
    on_nan_log_probs: str = option_field("on_nan_log_probs", "raise")
    drop_invalid_pairs: bool = option_field("drop_invalid_pairs", False)
    prefix_sharing: bool = option_field("prefix_sharing", False)
    compute_ches: bool = option_field("compute_ches", False)

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        check_option_types(self, NoiseDPOConfig, "loss_type", "loss_weights", "label_smoothing", "beta")
        self.loss_type = list(self.loss_type)
        self._unify_flip_rate()
        self._check_losses()
        if self.on_nan_log_probs not in ("raise", "skip"):
            raise ValueError(f"on_nan_log_probs must be 'raise' or 'skip', got {self.on_nan_log_probs!r}.")
        if self.on_nan_log_probs == "skip" and self.fp16:
            raise ValueError(
                "on_nan_log_probs='skip' cannot be combined with fp16=True: the gradient scaler fails on a step "
                "without gradients, and skips steps that overflow by itself. Use bf16=True, or "
                "on_nan_log_probs='raise'."
            )
        self.pair_context()
        self._check_ches()
        refuse_ignored_settings(self)
        super().__post_init__()

    def pair_context(self) -> PairContext:
        """Return the context of the pair losses that is constant over the run."""
        return PairContext(
            flip_rate=self.flip_rate if isinstance(self.flip_rate, float) else None,  # not "auto"
            beta=self.beta,
            holder_gamma=self.holder_gamma,
            sym_temperature=self.sym_temperature,
            ropo_alpha=self.ropo_alpha,
            robust_rescale=self.robust_rescale,
            robust_margin_limit=self.robust_margin_limit,
        )

    @property
    def has_per_pair_columns(self) -> bool:
        """Whether the losses depend on columns of the dataset that TRL does not know."""
        return self.flip_rate_column is not None or self.sample_weight_column is not None

    def base_loss(self, name: str) -> str:
        """Return the loss per pair behind a name of `loss_type`; a subclass may know names made of others."""
        return name

    def reads_flip_rate(self, name: str) -> bool:
        """Return whether the loss of that name reads the flip rate."""
        name = self.base_loss(name)
        if name in pair_loss_names():
            return find_pair_loss(name).reads_flip_rate
        return name in TRL_LOSSES_WITH_FLIP_RATE

    def is_computed_by_trl(self, name: str) -> bool:
        """Return whether TRL's own code computes that loss: whenever it can, so that it stays equal to the bit."""
        if name not in TRL_LOSSES:
            return False
        if self.sample_weight_column is not None:
            return False
        if self.flip_rate_column is not None and self.reads_flip_rate(name):
            return False
        return not (name == "robust" and (self.robust_rescale or self.robust_margin_limit is not None))

    def _unify_flip_rate(self) -> None:
        """Make `flip_rate` and `label_smoothing` one quantity."""
        smoothing = _as_number("label_smoothing", self.label_smoothing)
        if self.flip_rate is None:
            self.flip_rate = smoothing if smoothing != 0.0 else None
        else:
            self.flip_rate = _as_number("flip_rate", self.flip_rate)
            if smoothing not in (0.0, self.flip_rate):
                raise ValueError(
                    f"flip_rate={self.flip_rate:g} and label_smoothing={smoothing:g} are two names of one quantity "
                    "and differ. Give flip_rate only."
                )
        if self.flip_rate is not None:
            check_flip_rate(self.flip_rate)
        self.label_smoothing = self.flip_rate or 0.0

    def _check_losses(self) -> None:
        if not self.loss_type:
            raise ValueError("loss_type is empty; give at least one loss, for instance 'sym'.")
        for name in self.loss_type:
            if name not in TRL_LOSSES and self.base_loss(name) not in pair_loss_names():
                ours = [loss for loss in pair_loss_names() if loss not in TRL_LOSSES]
                raise ValueError(
                    f"unknown loss {name!r} in loss_type; TRL has {', '.join(TRL_LOSSES)}; hfnoise adds "
                    f"{', '.join(ours)}. Add your own with hfnoise.register_pair_loss."
                )
        for weight in self.loss_weights or []:
            if not math.isfinite(weight):
                raise ValueError(f"loss_weights must be finite numbers, got {weight!r}.")
        ours = [name for name in self.loss_type if not self.is_computed_by_trl(name)]
        self._check_flip_rate_is_used()
        without_pair_form = [name for name in ours if self.base_loss(name) not in pair_loss_names()]
        if without_pair_form:
            raise ValueError(
                f"{without_pair_form} cannot be weighted pair by pair (flip_rate_column, sample_weight_column, BVPO): "
                f"TRL reduces it over the batch. Use losses with a value per pair: {', '.join(pair_loss_names())}."
            )
        if ours:
            self._check_margin_options(ours)

    def _check_ches(self) -> None:
        if self.compute_ches and not self.precompute_ref_log_probs:
            raise ValueError(
                "compute_ches=True needs precompute_ref_log_probs=True: the scores come from the pass that computes "
                "the reference log-probabilities before training. Set it, or call trainer.score_dataset(dataset)."
            )
        if self.compute_ches:
            refuse_prefix_sharing(self)

    def _check_flip_rate_is_used(self) -> None:
        readers = [name for name in self.loss_type if self.reads_flip_rate(name)]
        known = self.flip_rate is not None or self.flip_rate_column is not None
        # Without a rate TRL's `robust` is plain DPO, which nobody who names it wants; its other losses mean 0 by none.
        lacking = [name for name in readers if not known and (name == "robust" or name not in TRL_LOSSES)]
        if lacking:
            raise ValueError(
                f"loss_type {lacking} needs a flip rate: give flip_rate in [0, 0.5) or flip_rate_column, or use 'sym' "
                "or 'holder', which need none."
            )
        bases = [self.base_loss(name) for name in self.loss_type]
        used = readers or any(name in _RATE_FREE_ROBUST or name not in TRL_LOSSES for name in bases)
        if (self.flip_rate or self.flip_rate_column) and not used:
            raise ValueError(
                f"flip_rate={self.flip_rate} and flip_rate_column={self.flip_rate_column!r} would be ignored by "
                f"loss_type {self.loss_type} (TRL ignores a rate without a word). Use 'robust', 'forward_corrected' "
                "or 'cdpo', or leave flip_rate, flip_rate_column and label_smoothing out."
            )

    def _check_margin_options(self, ours: list[str]) -> None:
        """Refuse the options of TRL that change what the margin is, for losses that are functions of it."""
        changed = {
            "f_divergence_type": (self.f_divergence_type, "reverse_kl"),
            "ld_alpha": (self.ld_alpha, None),
            "use_weighting": (self.use_weighting, False),
        }
        for name, (value, neutral) in changed.items():
            if value != neutral:
                raise ValueError(
                    f"{name}={value!r} cannot be combined with {ours}, which are defined on the plain DPO margin. "
                    f"Set {name}={neutral!r}, or use TRL's losses alone ({', '.join(TRL_LOSSES)})."
                )


def _as_number(name: str, value: Any) -> float:
    """Return the option as a float: YAML and the command line may bring strings."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number in [0, 0.5), got {value!r}.") from None
