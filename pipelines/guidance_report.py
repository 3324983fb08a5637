"""What a run of a guider did: who stopped when, at which similarity, and what was saved."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfnoise.strict_json import parse_json

_FORMAT = 1


@dataclass(frozen=True)
class GuidanceReport:
    """A run of a guider.

    Steps are counted from 0, so a sample that stops at step 9 was guided for 9 steps.

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
        >>> report = GuidanceReport(torch.tensor([[0.9], [0.999], [torch.nan], [torch.nan]]), (2,), (2, 2, 1, 1), 1)
        >>> print(report)
        1 sample, 4 steps: 6 of 8 evaluations, 25.0 % saved; stopped at step 2
        >>> report.evaluations, report.saved
        (6, 0.25)
    """

    similarity: torch.Tensor
    stop_steps: tuple[int | None, ...]
    rows: tuple[int, ...]
    batch: int
    predictions: int = 2

    def __repr__(self) -> str:
        # What a notebook shows: not the whole tensor.
        return f"<GuidanceReport: {self}>"

    def __str__(self) -> str:
        share = f"{100 * self.saved:.1f} % saved" if self.evaluations < self.full_evaluations else "none saved"
        return (
            f"{_count(self.batch, 'sample')}, {_count(len(self.rows), 'step')}: {self.evaluations} of "
            f"{self.full_evaluations} evaluations, {share}{self._stops()}"
        )

    def _stops(self) -> str:
        stops = sorted(stop for stop in self.stop_steps if stop is not None)
        if not stops:
            return "" if self.similarity.isnan().all() else "; none stopped"
        who = "stopped" if len(stops) == self.batch else f"{len(stops)} of {self.batch} stopped,"
        return f"; {who} at " + (f"steps {stops[0]} to {stops[-1]}" if stops[0] < stops[-1] else f"step {stops[0]}")

    @property
    def evaluations(self) -> int:
        """Forward passes, counted per sample."""
        return sum(self.rows)

    @property
    def full_evaluations(self) -> int:
        """Those that full guidance would have made."""
        return self.predictions * self.batch * len(self.rows)

    @property
    def saved(self) -> float:
        """The share of the evaluations of full guidance that was not made."""
        return 1 - self.evaluations / self.full_evaluations if self.full_evaluations else 0.0

    @property
    def sample_evaluations(self) -> tuple[int, ...]:
        """Forward passes of each sample; together they are `evaluations`."""
        totals = [len(self.rows)] * self.batch
        for step, rows in enumerate(self.rows):
            if rows == self.batch:
                continue
            for sample, stop in enumerate(self.stop_steps):
                # With at_detection="cond" guidance ends at a step whose evaluation was made: it was measured.
                measured = step < len(self.similarity) and not self.similarity[step, sample].isnan()
                if rows == self.predictions * self.batch or stop is None or step < stop or measured:
                    totals[sample] += self.predictions - 1
        return tuple(totals)

    @classmethod
    def join(cls, reports: Sequence[GuidanceReport]) -> GuidanceReport:
        """Return one report of several batches, in their order.

        Raises:
            ValueError: if there are none, or their numbers of steps or of predictions differ.

        Example:
            >>> import torch
            >>> from hfnoise.pipelines.guidance_report import GuidanceReport
            >>> report = GuidanceReport(torch.tensor([[0.9], [0.999]]), (None,), (2, 2), 1)
            >>> GuidanceReport.join([report, report]).rows
            (4, 4)
        """
        kinds = {(len(report.rows), report.predictions) for report in reports}
        if len(kinds) != 1:
            raise ValueError(
                f"only runs with one number of steps and of predictions can be joined, got {sorted(kinds)} as "
                "(steps, predictions)."
            )
        return cls(
            similarity=torch.cat([report.similarity for report in reports], dim=1),
            stop_steps=tuple(stop for report in reports for stop in report.stop_steps),
            rows=tuple(sum(rows) for rows in zip(*(report.rows for report in reports), strict=True)),
            batch=sum(report.batch for report in reports), predictions=reports[0].predictions,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold; a similarity that was not measured is `None`.

        Example:
            >>> import torch
            >>> from hfnoise.pipelines.guidance_report import GuidanceReport
            >>> GuidanceReport(torch.tensor([[0.5], [torch.nan]]), (1,), (2, 1), 1).to_dict()["similarity"]
            [[0.5], [None]]
        """
        trace = [[None if math.isnan(value) else value for value in step] for step in self.similarity.tolist()]
        return {
            "format": _FORMAT, "summary": str(self), "batch": self.batch, "predictions": self.predictions,
            "rows": list(self.rows), "stop_steps": list(self.stop_steps), "similarity": trace,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> GuidanceReport:
        """Return what [`GuidanceReport.to_dict`] wrote.

        Raises:
            ValueError: if something is missing, or it was written by a later version.
        """
        if entries.get("format") != _FORMAT:
            raise ValueError(f"a guidance report of format {entries.get('format')!r}; this version reads {_FORMAT}.")
        try:
            trace = [[math.nan if value is None else float(value) for value in step] for step in entries["similarity"]]
            return cls(
                similarity=torch.tensor(trace).reshape(len(trace), entries["batch"]),
                stop_steps=tuple(entries["stop_steps"]), rows=tuple(entries["rows"]), batch=entries["batch"],
                predictions=entries["predictions"],
            )  # fmt: skip
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"this is no guidance report of hfnoise: {error}.") from error

    def save(self, path: str | Path) -> None:
        """Write a JSON file; its folder is made if it is missing."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_dict(), allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> GuidanceReport:
        """Read a JSON file of [`GuidanceReport.save`].

        Raises:
            ValueError: if it is none.

        Example:
            >>> import torch
            >>> from hfnoise.pipelines.guidance_report import GuidanceReport
            >>> GuidanceReport(torch.tensor([[0.5]]), (None,), (2,), 1).save("report.json")
            >>> GuidanceReport.load("report.json").rows
            (2,)
        """
        try:
            entries = parse_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no guidance report of hfnoise: {error}.") from error
        if not isinstance(entries, dict):
            raise ValueError(f"{str(path)!r} is no guidance report of hfnoise.")
        return cls.from_dict(entries)

    def plot(self, path: str | Path, threshold: float | None = None) -> None:
        """Write a picture: similarity of each sample against the step with its stop, and the rows of each step.

        Args:
            path (`str` or `Path`): a PNG, SVG or PDF file; its folder is made if it is missing.
            threshold (`float`, *optional*): draws a line at it.
        """
        from hfnoise.pipelines.guidance_plot import plot_report

        plot_report(self, path, threshold)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
