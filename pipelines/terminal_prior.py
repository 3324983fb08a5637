"""The terminal prior: a start that scatters as the images do."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfnoise.latents import ResidualStatistics
from hfnoise.pipelines.start_context import StartContext
from hfnoise.pipelines.start_estimate import Estimate, StartEstimate


class TerminalPrior(StartEstimate):
    """Adds a draw of what One More Step leaves over to its estimate: of the channel means, and of waves if measured.

    Ours, beyond the paper: with [`OneMoreStep`] alone all images of a prompt start from about the same brightness, so
    that they scatter too little. A module whose training measured the statistics has them in its config, and
    [`OneMoreStep`] uses them by itself; this member is for statistics of your own, alone or behind a [`OneMoreStep`],
    which then leaves its module's aside. They serve images of every size. With more frequencies the same generator
    gives the same channel means.

    Args:
        statistics ([`hfnoise.latents.ResidualStatistics`] or its dictionary): of x0 - x0_hat, in latents.
        scale (`float`, defaults to `1.0`): of the draw; 0 is off.

    Raises:
        TypeError, ValueError: if the statistics are none, or the scale is negative.

    Example:
        >>> from hfnoise.latents import ResidualStatistics
        >>> from hfnoise.pipelines import TerminalPrior
        >>> TerminalPrior(ResidualStatistics([0.0], [[0.04]])).is_off
        False
    """

    draws_residuals: ClassVar[bool] = True

    def __init__(self, statistics: ResidualStatistics | Mapping[str, Any], scale: float = 1.0) -> None:
        if isinstance(statistics, Mapping):
            statistics = ResidualStatistics.from_config(statistics)
        if not isinstance(statistics, ResidualStatistics):
            raise TypeError(f"statistics must be ResidualStatistics, got {type(statistics).__name__}.")
        check_scale(scale)
        self.statistics, self.scale = statistics, scale

    @classmethod
    def fit(cls, residuals: Tensor, scale: float = 1.0, frequencies: int = 1) -> TerminalPrior:
        """Return the prior of residuals x0 - x0_hat; arguments as of [`~hfnoise.latents.ResidualStatistics.fit`]."""
        return cls(ResidualStatistics.fit(residuals, frequencies), scale)

    def estimate(self, noise: Tensor, context: StartContext) -> Estimate:
        """Return a draw from the generator of the call; with one frequency it is constant over the image."""
        if noise.dim() < 3:
            raise ValueError(f"latents of shape {tuple(noise.shape)} have no channels and space of their own.")
        channels, count = noise.shape[1], self.statistics.frequencies**2
        # The means first, and alone: they are then the same with any number of frequencies.
        normal = context.normal(1, channels)
        if count > 1:
            normal = torch.cat([normal, context.normal(count - 1, channels)], 1)
        return Estimate(self.statistics.draw(normal, noise.shape[2:]), noise)

    def __repr__(self) -> str:
        return f"TerminalPrior({self.statistics}, scale={self.scale})"

    def to_config(self) -> dict[str, Any]:
        """Return the options."""
        return {"statistics": self.statistics.to_config(), "scale": float(self.scale)}


def check_scale(scale: float) -> None:
    """Raise ValueError unless a scale is finite and at least 0.

    Example:
        >>> from hfnoise.pipelines.terminal_prior import check_scale
        >>> check_scale(1.0)
    """
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0.0 <= scale < float("inf"):
        raise ValueError(f"scale must be at least 0, where 0 is off; got {scale!r}.")
