"""Robust DPO: one argument, the flip rate, known or not."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from datasets import Dataset

from hfnoise.methods import find_method
from hfnoise.option_types import check_option_types
from hfnoise.options import ROBUST_DPO_OPTIONS, option_help
from hfnoise.preference.flip_rate import FlipRateEstimate, estimate_flip_rate, posterior_flip
from hfnoise.trainers.noise_dpo import NoiseDPOTrainer
from hfnoise.trainers.noise_dpo_config import NoiseDPOConfig, option_field
from hfnoise.trainers.preference_data import PAIR_INDEX
from hfnoise.trainers.reference_cache import with_columns, without_columns

__all__ = ["RobustDPOConfig", "RobustDPOTrainer"]

logger = logging.getLogger(__name__)

AUTO = "auto"
# Chosen by benchmarks/preference_noise.py; see docs/preference.md for the table.
LOSS_WITHOUT_RATE = "sym"
LOSS_WITH_RATE = "robust"
# What training added to the user's dataset, or is about to add: removed before a dataset is handed back.
_TECHNICAL_COLUMNS = (
    "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps", PAIR_INDEX,
)  # fmt: skip


@dataclass
class RobustDPOConfig(NoiseDPOConfig):
    """Configuration for [`RobustDPOTrainer`]: [`NoiseDPOConfig`] with the loss chosen from what is known of the noise.

    Args:
        flip_rate (`float` or `"auto"`, defaults to `"auto"`): probability that a label is flipped, in [0, 0.5).
            `"auto"` trains with `sym` throughout, which needs no rate; at step 0 no rate can be known. The rate is
            estimated after training, from the margins of the evaluation pairs, for the report and the suspects.
        loss_type (`list[str]`, *optional*): chosen from `flip_rate` unless you give one.
        sym_temperature (`float`, defaults to `4.0`): unit of margin of `sym`, above 0; 1 is the loss of the paper.
        audit_column (`str`, *optional*): boolean column of the evaluation dataset, true where a re-labelled pair
            disagrees with the recorded label, empty where a pair was not audited.

    Raises:
        ValueError: for any value out of range, or a loss that needs a rate together with `"auto"`.

    Example:
        >>> from hfnoise import RobustDPOConfig
        >>> RobustDPOConfig("out", use_cpu=True, bf16=False).loss_type
        ['sym']
        >>> RobustDPOConfig("out", flip_rate=0.2, use_cpu=True, bf16=False).loss_type
        ['robust']
    """

    flip_rate: float | str | None = option_field("flip_rate", AUTO, ROBUST_DPO_OPTIONS)
    loss_type: list[str] = field(
        default_factory=lambda: [AUTO],
        metadata={"help": f"Losses; chosen from flip_rate by default ('{LOSS_WITHOUT_RATE}' or '{LOSS_WITH_RATE}')."},
    )
    sym_temperature: float = option_field("sym_temperature", 4.0, ROBUST_DPO_OPTIONS)
    audit_column: str | None = field(default=None, metadata={"help": option_help(ROBUST_DPO_OPTIONS, "audit_column")})

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        check_option_types(self, RobustDPOConfig)
        rate_unknown = isinstance(self.flip_rate, str) and self.flip_rate.strip().lower() == AUTO
        if self.flip_rate is None:
            raise ValueError("flip_rate must be a number in [0, 0.5) or 'auto', got None.")
        if rate_unknown:
            self.flip_rate = None  # label_smoothing, TRL's name for it, may still give one
            rate_unknown = not self.label_smoothing and self.flip_rate_column is None
        if list(self.loss_type) == [AUTO]:
            self.loss_type = [LOSS_WITHOUT_RATE if rate_unknown else LOSS_WITH_RATE]
        super().__post_init__()
        if self.flip_rate is None:
            self.flip_rate = AUTO


class RobustDPOTrainer(NoiseDPOTrainer):
    """Trains with DPO on labels of which an unknown or known share is flipped, and says which ones look flipped.

    After training it has `flip_rate_estimate` (from the held-out margins of `eval_dataset`, which must carry labels
    from the same source as the training data), `flip_rate_by_annotator`, and `export_suspects()`.

    Example:
        >>> from hfnoise import RobustDPOTrainer
        >>> RobustDPOTrainer._paper["id"]
        '2403.00409'
    """

    _method = find_method("robust-dpo")
    _tag_names = ["trl", *_method.tags]
    _name = "RobustDPO"
    _config_class = RobustDPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given_train_dataset = kwargs.get("train_dataset")
        self.flip_rate_estimate: FlipRateEstimate | None = None
        self.flip_rate_by_annotator: dict[Any, FlipRateEstimate] = {}
        logger.info("RobustDPO: flip_rate=%s, loss_type=%s", self.args.flip_rate, self.args.loss_type)
        if self.args.flip_rate == AUTO and self.eval_dataset is None:
            logger.warning(
                "RobustDPO got no eval_dataset: training needs none, but the flip rate is estimated from held-out "
                "pairs and will not be. Pass an eval_dataset whose labels come from the same source."
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then estimate the flip rate from the evaluation pairs, if there are any."""
        output = super().train(*args, **kwargs)
        if self.eval_dataset is not None:
            try:
                self.estimate_flip_rate()
            except ValueError as error:  # the run is over and worth saving
                logger.warning("the flip rate was not estimated: %s", error)
        return output

    def check_datasets(self, args: Any, train_dataset: Any, eval_dataset: Any) -> None:
        """Raise ValueError for datasets that cannot be trained on or audited, before a model is loaded."""
        super().check_datasets(args, train_dataset, eval_dataset)
        if args.audit_column is not None:
            self._audit(args.audit_column, _first_dataset(eval_dataset))

    def estimate_flip_rate(self, dataset: Any = None) -> FlipRateEstimate:
        """Return the flip rate of the labels of held-out pairs, and keep it in `flip_rate_estimate`.

        Args:
            dataset (`datasets.Dataset`, *optional*): pairs the model was not trained on, labelled by the same source
                as the training pairs; `eval_dataset` (the first, if there are several) by default.

        Returns:
            [`FlipRateEstimate`]: look at `refused` before using it.

        Raises:
            ValueError: if there is no held-out dataset.
        """
        dataset = self.prepared(self._held_out() if dataset is None else dataset)
        margins = self.pair_margins(dataset)
        finite = margins.isfinite()
        if not finite.all():
            logger.warning("%d of %d held-out margins are not finite: left out.", int((~finite).sum()), len(margins))
        audit = None if self.args.audit_column is None else self._audit(self.args.audit_column, dataset)
        estimate = estimate_flip_rate(margins[finite], audit=audit)
        self.flip_rate_estimate = estimate
        column = self.args.annotator_column
        if column is not None and isinstance(dataset, Dataset) and column in dataset.column_names:
            names = list(dataset[column])
            members = {name: finite & torch.tensor([other == name for other in names]) for name in self.annotators}
            self.flip_rate_by_annotator = {
                name: estimate_flip_rate(margins[member]) for name, member in members.items() if member.any()
            }
        if estimate.refused:
            logger.warning("the flip rate could not be estimated: %s", estimate.reason)
        low, high = estimate.interval
        self.log(
            {
                "noise/flip_rate_estimate": estimate.flip_rate,
                "noise/flip_rate_low": low,
                "noise/flip_rate_high": high,
                "noise/flip_rate_refused": float(estimate.refused),
            }
        )
        return estimate

    def export_suspects(self, dataset: Any = None, flip_rate: float | None = None) -> Any:
        """Return the dataset with `margin` and `p_flip`, the probability that the label of the pair is flipped.

        p_flip is the posterior sigma(-c h - logit(1 - flip_rate)) at the present policy, h being the margin and c the
        calibration of the estimate. With one rate for all pairs its order is that of the margins, whatever the rate;
        so where the estimate was refused p_flip still ranks, by the middle of the interval, and a warning says that
        its level means nothing. Margins of pairs the model was trained on are larger than those of held-out pairs, so
        on training data p_flip ranks better than it calibrates; `hfnoise audit-labels` cross-fits instead.

        Args:
            dataset (`datasets.Dataset`, *optional*): the training dataset by default.
            flip_rate (`float`, *optional*): in [0, 0.5); by default the rate of the configuration, else the estimate.

        Returns:
            `datasets.Dataset`: your rows in their order, less those that `drop_invalid_pairs` dropped, with the float
            columns `margin` (the lower, the more suspect) and `p_flip`, which replace columns of these names.

        Raises:
            ValueError: if no flip rate is given and none was estimated, or the dataset is a streaming one.
        """
        given = self._given_train_dataset if dataset is None else dataset
        if not isinstance(given, Dataset):
            raise ValueError(
                f"export_suspects adds columns to a map-style dataset, got {type(given).__name__}. Load the pairs "
                "without streaming=True and pass them as dataset."
            )
        dataset = self.train_dataset if dataset is None else self.prepared(given)
        rates: Any = self._known_rate(flip_rate)
        column = self.args.annotator_column
        if flip_rate is None and self.flip_rate_by_annotator and column in dataset.column_names:
            usable = {name: part.flip_rate for name, part in self.flip_rate_by_annotator.items() if not part.refused}
            rates = torch.tensor([usable.get(name, rates) for name in dataset[column]])
        margins = self.pair_margins(dataset).double()
        estimate = self.flip_rate_estimate
        p_flip = posterior_flip(margins, rates, scale=1.0 if estimate is None else estimate.scale)
        dataset = without_columns(self.given_rows(given, dataset), _TECHNICAL_COLUMNS)
        return with_columns(dataset, {"margin": margins, "p_flip": p_flip})

    def report(self) -> dict[str, Any]:
        """Return what is known of the noise, for the card: the rate used, the estimates in all and per annotator."""
        estimate = self.flip_rate_estimate
        return {
            "flip_rate": self.args.flip_rate,
            "estimate": None if estimate is None else asdict(estimate),
            "by_annotator": {str(name): asdict(part) for name, part in self.flip_rate_by_annotator.items()},
        }

    def _held_out(self) -> Any:
        if self.eval_dataset is None:
            raise ValueError("no held-out pairs: pass eval_dataset to the trainer, or a dataset to this method.")
        return _first_dataset(self.eval_dataset)

    @staticmethod
    def _audit(column: str, dataset: Any) -> list[bool]:
        if not isinstance(dataset, Dataset) or column not in dataset.column_names:
            columns = getattr(dataset, "column_names", None)
            raise ValueError(
                f"audit_column {column!r} must be a column of eval_dataset, a map-style one; it has {columns}."
            )
        values = [value for value in dataset[column] if value is not None]
        if not values or not all(value in (True, False) for value in values):
            raise ValueError(
                f"audit_column {column!r} must hold true, false or nothing, and not nothing in every row; it holds "
                f"{sorted(set(values), key=str)[:5]}."
            )
        return [bool(value) for value in values]

    def _known_rate(self, flip_rate: float | None) -> float:
        """Return the rate behind p_flip; warn where it rests on a refused estimate."""
        if flip_rate is not None:
            return flip_rate
        if isinstance(self.args.flip_rate, float):
            return self.args.flip_rate
        estimate = self.flip_rate_estimate
        if estimate is None:
            first = "pass an eval_dataset to the trainer" if self.eval_dataset is None else "train"
            raise ValueError(
                f"no flip rate is known, because none was estimated: {first}, call estimate_flip_rate(held_out_pairs),"
                " or pass flip_rate to export_suspects (a guess will do: the order of p_flip is the same)."
            )
        if estimate.refused:
            logger.warning("%s", refused_estimate_note(estimate))
        return estimate.rate_for_posterior()


def refused_estimate_note(estimate: FlipRateEstimate) -> str:
    """Return the sentence that goes with every p_flip that rests on a refused estimate."""
    low, high = estimate.interval
    return (
        "p_flip ranks the pairs but its level means nothing: the estimate of the flip rate was refused, so p_flip is "
        f"taken at {estimate.rate_for_posterior():.2f}, the middle of the interval from {low:.2f} to {high:.2f}, "
        f"inside [0.01, 0.45]. Give flip_rate to have probabilities. Refused because: {estimate.reason}"
    )


def _first_dataset(datasets: Any) -> Any:
    return next(iter(datasets.values())) if isinstance(datasets, dict) else datasets
