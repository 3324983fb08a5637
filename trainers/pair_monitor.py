"""Watches the margins of a run: noise metrics, and log-probabilities that are not finite."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from hfnoise.preference.flip_rate import posterior_flip
from hfnoise.preference.pair_loss_table import pair_loss_names
from hfnoise.trainers.pair_batch import PairBatch

logger = logging.getLogger(__name__)

# More annotators than this would fill the log; the report of RobustDPOTrainer has them all.
_LOGGED_ANNOTATORS = 16


class PairMonitor:
    """Adds noise metrics to TRL's and handles NaN: one small reduction over the processes per micro-batch.

    Metrics: `noise/posterior_flip_mean` and `noise/suspect_fraction` (posterior above one half), given a flip rate;
    `noise/effective_fraction`, (sum w)^2 / (n sum w^2) with w = -dL/dh, the share of pairs that carry the gradient;
    `noise/chosen_logp_delta`, the mean of log pi(chosen) - log pi_ref(chosen), below 0 where likelihood is displaced
    (arXiv 2410.08847); `noise/agreement/<annotator>`, the share of an annotator's labels that the model agrees with.
    """

    def __init__(self, trainer: Any, args: Any) -> None:
        self.trainer = trainer
        self.on_nan = args.on_nan_log_probs
        self.skip_step = False
        self.margins_are_plain = (
            args.f_divergence_type == "reverse_kl" and args.ld_alpha is None and not args.use_weighting
        )
        weights = args.loss_weights or [1.0] * len(args.loss_type)
        self._losses = list(zip(args.loss_type, weights, strict=True))
        self._has_weights = self.margins_are_plain and all(name in pair_loss_names() for name, _ in self._losses)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keep the metrics of a micro-batch out of the log if its step is skipped."""
        metrics = self.trainer._metrics[self._mode]
        before = {name: len(values) for name, values in metrics.items()}
        skipped_before = self.skip_step
        yield
        if self.skip_step and not skipped_before:
            for name, values in list(metrics.items()):
                del values[before.get(name, 0) :]
                if not values:  # TRL divides by their number
                    del metrics[name]
            metrics["noise/skipped_steps"].append(1.0)

    @property
    def _mode(self) -> str:
        return "train" if self.trainer.model.training else "eval"

    @torch.no_grad()
    def observe(self, pairs: PairBatch, inputs: dict[str, Any]) -> None:
        """Record the metrics of a micro-batch.

        Raises:
            ValueError: if log-probabilities are not finite and `on_nan_log_probs="raise"`, on every process alike.
        """
        margins = pairs.margins.detach()
        finite = torch.isfinite(margins)
        sums = {"bad": (~finite).sum(), "count": margins.new_tensor(float(margins.numel()))}
        if self.trainer.args.ld_alpha is None:  # else the reference holds other sums than the scores
            sums["chosen_delta"] = pairs.chosen_scores.detach().sum()
        if self.margins_are_plain:
            sums |= self._posterior_sums(pairs, margins) | self._weight_sums(pairs, margins)
        per_annotator = self._annotator_sums(pairs, margins)
        packed = torch.cat([torch.stack([value.float() for value in sums.values()]), *per_annotator])
        reduced = self.trainer.accelerator.reduce(packed, reduction="sum").tolist()
        totals = dict(zip(sums, reduced, strict=False))
        if totals["bad"]:
            self._handle_bad(pairs, inputs, ~finite, int(totals["bad"]))
        else:
            self._record(totals, reduced[len(sums) :])

    def _posterior_sums(self, pairs: PairBatch, margins: Tensor) -> dict[str, Tensor]:
        flip_rate = pairs.flip_rate if pairs.flip_rate is not None else self.trainer.args.flip_rate
        if not isinstance(flip_rate, (float, Tensor)):  # unknown, or still to be estimated
            return {}
        posterior = posterior_flip(margins, flip_rate)
        return {"posterior": posterior.sum(), "suspects": (posterior > 0.5).sum()}

    def _weight_sums(self, pairs: PairBatch, margins: Tensor) -> dict[str, Tensor]:
        if not self._has_weights:
            return {}
        with torch.enable_grad():
            leaf = margins.clone().requires_grad_()
            total = self.trainer.weighted_pair_values(self._losses, pairs, leaf).sum()
            (slope,) = torch.autograd.grad(total, leaf, allow_unused=True)
        if slope is None:  # a registered loss that does not look at the margin
            return {}
        return {"weight": -slope.sum(), "weight_squared": slope.square().sum()}

    def _annotator_sums(self, pairs: PairBatch, margins: Tensor) -> list[Tensor]:
        annotators = self.trainer.annotators
        if pairs.annotator is None or not 0 < len(annotators) <= _LOGGED_ANNOTATORS:
            return []
        known = pairs.annotator >= 0
        member = torch.nn.functional.one_hot(pairs.annotator.clamp(min=0), len(annotators)).float() * known[:, None]
        return [member.sum(0), (member * (margins > 0)[:, None]).sum(0)]

    def _record(self, totals: dict[str, float], per_annotator: list[float]) -> None:
        metrics = self.trainer._metrics[self._mode]
        count = totals["count"]
        if "chosen_delta" in totals:
            metrics["noise/chosen_logp_delta"].append(totals["chosen_delta"] / count)
        if "posterior" in totals:
            metrics["noise/posterior_flip_mean"].append(totals["posterior"] / count)
            metrics["noise/suspect_fraction"].append(totals["suspects"] / count)
        if totals.get("weight_squared"):
            metrics["noise/effective_fraction"].append(totals["weight"] ** 2 / (count * totals["weight_squared"]))
        half = len(per_annotator) // 2
        for name, number, agreed in zip(
            self.trainer.annotators, per_annotator[:half], per_annotator[half:], strict=False
        ):
            if number:
                metrics[f"noise/agreement/{name}"].append(agreed / number)

    def _handle_bad(self, pairs: PairBatch, inputs: dict[str, Any], bad: Tensor, count: int) -> None:
        step = self.trainer.state.global_step
        rows = pairs.index if pairs.index is not None else torch.full_like(bad, -1, dtype=torch.long)
        gathered = self.trainer.accelerator.gather(torch.where(bad, rows, torch.full_like(rows, -2))).tolist()
        named = sorted({row for row in gathered if row >= 0})
        where = f"rows {named[:5]} of the dataset" if named else "of a dataset without row numbers"
        message = (
            f"log-probabilities are not finite for {count} preference pair(s), {where}, at step {step} ({self._mode})"
            f"{self._prompt_of_first(inputs, bad)}"
        )
        if self.on_nan == "raise":
            raise ValueError(
                f"{message}. Training stopped before this step changed the model; the last checkpoint is intact. "
                "Remove the pair, lower the learning rate, or set on_nan_log_probs='skip' to leave such steps out."
            )
        if self._mode == "train":
            self.skip_step = True
            logger.warning("%s. The optimizer step is left out on every process.", message)
        else:
            logger.warning("%s. The evaluation loss of this batch is not finite.", message)

    def _prompt_of_first(self, inputs: dict[str, Any], bad: Tensor) -> str:
        """Return the start of the first offending prompt of all processes, to recognise it by eye."""
        here = []
        if bad.any():
            row = int(bad.nonzero()[0])
            is_prompt = (inputs["completion_mask"][row] == 0) & (inputs["attention_mask"][row] == 1)
            here = [self.trainer._tokenizer.decode(inputs["input_ids"][row][is_prompt])]
        return "".join(f", prompt {text[:80]!r}" for text in gather_object(here)[:1])
