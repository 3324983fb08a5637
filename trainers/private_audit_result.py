"""What an audit of a private training found: numbers, a verdict in words, a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hfnoise.privacy.audit import AuditEstimate

_BINS = 40


@dataclass(frozen=True)
class AuditResult:
    """Claim and finding of one audited run; see [`dp_audit`].

    An audit finds bugs. It never certifies an epsilon: with a perfect attack and a thousand canaries it shows about
    half of the truth, so a small bound says nothing, while a bound above the claim says that the claim is false.

    Args:
        claimed_epsilon (`float`): what the accountant says of the run, at `delta`.
        estimate ([`~hfnoise.privacy.audit.AuditEstimate`]): the lower bound, its ceiling, guesses and AUROC.
        score (`str`): `"loss"` (black box) or `"gradient"` (white box).
        scores (`Tensor[canaries]`): higher means more likely in.
        included (`Tensor[canaries]`, bool): who was in.
        trainer: the audited Trainer, trained.
    """

    claimed_epsilon: float
    estimate: AuditEstimate
    score: str
    scores: Tensor = field(repr=False, compare=False)
    included: Tensor = field(repr=False, compare=False)
    trainer: Any = field(repr=False, compare=False, default=None)

    @property
    def epsilon_lower_bound(self) -> float:
        """With probability 1 - significance, epsilon is at least this."""
        return self.estimate.epsilon_lower_bound

    @property
    def epsilon_ceiling(self) -> float:
        """The lower bound if every guess had been right: more this audit could not have found."""
        return self.estimate.epsilon_ceiling

    @property
    def auroc(self) -> float:
        """Probability that a canary that was in scores above one that was not."""
        return self.estimate.auroc

    @property
    def delta(self) -> float:
        """Delta of the claim and of the bound."""
        return self.estimate.delta

    @property
    def refuted(self) -> bool:
        """Whether the run contradicts its claim."""
        return self.estimate.refutes(self.claimed_epsilon)

    @property
    def verdict(self) -> str:
        """One sentence that says what the numbers mean."""
        e, sure = self.estimate, f"{1 - self.estimate.significance:.0%}"
        found = f"{e.correct} of {e.guesses_in + e.guesses_out} guesses about {e.canaries} canaries were right"
        bound = f"epsilon is at least {self.epsilon_lower_bound:.2f} with {sure} confidence at delta={self.delta:g}"
        if self.refuted:
            return (
                f"REFUTED: {found}, so {bound}, more than the claimed {self.claimed_epsilon:.2f}. The training does "
                "not do what is accounted for: noise missing or too small, clipping not applied, or sampling that is "
                "not independent. Do not release the model."
            )
        if not e.could_refute(self.claimed_epsilon):
            return (
                f"NOT REFUTED, and it could not be: {found}, so {bound}; with all guesses right that would be "
                f"{self.epsilon_ceiling:.2f}, below the claimed {self.claimed_epsilon:.2f}. Use more canaries. "
                "This certifies nothing."
            )
        return (
            f"not refuted: {found}, so {bound}; claimed is {self.claimed_epsilon:.2f}, at most "
            f"{self.epsilon_ceiling:.2f} could have been found. An audit finds bugs; it does not certify epsilon."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for reports and cards, without scores and without who was in."""
        e = self.estimate
        return {
            "claimed_epsilon": self.claimed_epsilon,
            "epsilon_lower_bound": self.epsilon_lower_bound,
            "epsilon_ceiling": self.epsilon_ceiling,
            "confidence": 1 - e.significance,
            "delta": self.delta,
            "canaries": e.canaries,
            "guesses": e.guesses_in + e.guesses_out,
            "correct": e.correct,
            "auroc": self.auroc,
            "score": self.score,
            "verdict": self.verdict,
        }

    def plot(self, path: str | Path) -> None:
        """Write a picture: how the scores of canaries that were in differ from those that were not.

        Args:
            path (`str` or `Path`): a PNG, SVG or PDF file; its folder is made if it is missing.
        """
        from matplotlib.figure import Figure

        inside, outside = self.scores[self.included], self.scores[~self.included]
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        edges = Tensor.histogram(self.scores.float(), bins=_BINS).bin_edges.tolist()
        axes.hist(outside.tolist(), edges, alpha=0.6, label=f"not in the training data ({len(outside)})")
        axes.hist(inside.tolist(), edges, alpha=0.6, label=f"in the training data ({len(inside)})")
        what = "drop of the loss" if self.score == "loss" else "update along the clipped gradient"
        axes.set(xlabel=f"score: {what}", ylabel="canaries")
        axes.set_title(
            f"AUROC {self.auroc:.2f}; epsilon claimed {self.claimed_epsilon:.2f}, shown at least "
            f"{self.epsilon_lower_bound:.2f}, at most {self.epsilon_ceiling:.2f} could be shown",
            fontsize=9,
        )
        axes.legend(frameon=False)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
