"""What a refined start cost, and how far it is from the noise that it was made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StartReport:
    """What a member of the slot `initial_noise` did in its last call: the attribute `report` of the member.

    It is read from the noise, or the text states, alone. What it means for images only a judge of images tells; the
    benchmarks do that.

    Args:
        evaluations (`int`): of the model, per sample: a prediction with or without prompt is one.
        similarity (`tuple[float, ...]`): cosine of each sample to what it was before. For text states 1 minus it is
            the alignment lost: what of the prompt the model is no longer told.
        diversity_before, diversity (`float`): mean distance of two samples, 1 for independent ones of unit variance;
            nan for one sample alone.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.start_report import StartReport
        >>> report = StartReport.of(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 3)
        >>> report.evaluations, report.diversity_before, report.diversity
        (3, 1.0, 0.0)
    """

    evaluations: int
    similarity: tuple[float, ...]
    diversity_before: float
    diversity: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor, evaluations: int = 0) -> StartReport:
        """Return the report of tensors of shape `(batch, ...)`."""
        first, second = (tensor.detach().float().flatten(1).cpu() for tensor in (before, after))
        similarity = torch.cosine_similarity(first, second, dim=1)
        return cls(evaluations, tuple(similarity.tolist()), _distance(first), _distance(second))

    @property
    def diversity_gained(self) -> float:
        """Mean distance of two samples, minus that before; negative where they came closer."""
        return self.diversity - self.diversity_before

    @property
    def alignment_lost(self) -> float:
        """Mean over the samples of 1 minus the similarity."""
        return 1.0 - sum(self.similarity) / len(self.similarity)


def _distance(rows: Tensor) -> float:
    if len(rows) < 2:
        return math.nan
    spread = rows.square().mean().sqrt() * math.sqrt(2 * rows.shape[1])
    return float(torch.pdist(rows).mean() / spread)
