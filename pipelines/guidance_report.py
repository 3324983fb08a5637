"""What a run of Adaptive Guidance did: who stopped when, at which similarity, and what was saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GuidanceReport:
    """A run of a guider.

    Args:
        similarity (`torch.Tensor` of shape `(steps, batch)`): the cosine of each step, NaN where it was not measured.
        stop_steps (`tuple` of `int` or `None`): per sample the first step without guidance; `None` if it never came.
        rows (`tuple[int, ...]`): rows that the denoiser evaluated, per step, of both predictions.
        batch (`int`): samples.
        predictions (`int`, defaults to `2`): of full guidance, per sample and step: 1 where none was asked for, 3 for
            models that follow an image and a text.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.guidance_report import GuidanceReport
        >>> report = GuidanceReport(torch.tensor([[0.9], [0.999]]), (2,), (2, 2, 1, 1), batch=1)
        >>> report.evaluations, report.saved
        (6, 0.25)
    """

    similarity: torch.Tensor
    stop_steps: tuple[int | None, ...]
    rows: tuple[int, ...]
    batch: int
    predictions: int = 2

    @property
    def evaluations(self) -> int:
        """Forward passes, counted per sample."""
        return sum(self.rows)

    @property
    def saved(self) -> float:
        """The share of the evaluations of full guidance that was not made."""
        full = self.predictions * self.batch * len(self.rows)
        return 1 - self.evaluations / full if full else 0.0
