"""The mixing share of BVPO estimated while training: gradients per prompt in, one number per step out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hfnoise.preference.trace_alpha import closed_form_alpha, gradient_moments

MOMENTS = ("trace_variance", "empty_variance", "covariance", "squared_bias")


@dataclass
class GradientSums:
    """Sums over the prompts of a step from which their moments follow; sums of processes and parts simply add.

    Args:
        packed (`torch.Tensor` of shape `(4 + 2 * parameters,)`, float64, *optional*): count, squared norms with traces
            and without, inner products, sum of the gradients with traces, sum of those without.
    """

    packed: Tensor | None = None

    def add(self, trace: Float[Tensor, "prompts parameters"], empty: Float[Tensor, "prompts parameters"]) -> None:
        """Add the gradients of some prompts, with traces and without."""
        trace, empty = trace.detach().double(), empty.detach().double()
        scalars = [trace.new_tensor(float(len(trace)))]
        scalars += [trace.square().sum(), empty.square().sum(), (trace * empty).sum()]
        packed = torch.cat([torch.stack(scalars), trace.sum(0), empty.sum(0)])
        self.packed = packed if self.packed is None else self.packed + packed

    def moments(self) -> tuple[int, tuple[float, float, float, float]]:
        """Return the number of prompts and the moments of one gradient: variances, covariance, squared bias.

        Raises:
            ValueError: below two prompts, where no variance is defined.
        """
        if self.packed is None or self.packed[0] < 2:
            raise ValueError("the moments of gradients need at least two prompts in a step.")
        count, trace_square, empty_square, product = self.packed[:4].tolist()
        trace_sum, empty_sum = self.packed[4:].chunk(2)
        moments = gradient_moments(int(count), trace_square, empty_square, product, trace_sum, empty_sum)
        return int(count), moments


@dataclass
class OnlineTraceAlpha:
    """Moving averages of the four moments, and the share that follows from them.

    Averaging the moments, which are unbiased, and not the share, which is a clamped ratio, keeps the estimate unbiased
    to first order. As in Adam the averages are divided by 1 - decay^updates, so the first estimate counts in full.

    Args:
        decay (`float`, defaults to `0.95`): of the moving averages, in [0, 1).
        smallest (`float`, defaults to `0.05`): the share stays in [smallest, 1 - smallest]: a gradient without a share
            in the loss is neither trained nor measured any more.
        alpha (`float`, defaults to `0.5`): the share before the first estimate: plain DPO on both datasets.

    Example:
        >>> from hfnoise.preference.online_trace_alpha import OnlineTraceAlpha
        >>> online = OnlineTraceAlpha()
        >>> online.update(8, (4.0, 1.0, 0.0, 1.0)), round(online.alpha, 3)
        (None, 0.692)
    """

    decay: float = 0.95
    smallest: float = 0.05
    alpha: float = 0.5
    updates: int = 0
    averages: list[float] = field(default_factory=lambda: [0.0] * len(MOMENTS))

    def update(self, count: int, moments: tuple[float, float, float, float]) -> None:
        """Take in the moments of one step and set `alpha` for a step of `count` prompts."""
        self.updates += 1
        self.averages = [
            self.decay * average + (1 - self.decay) * moment
            for average, moment in zip(self.averages, moments, strict=True)
        ]
        best = closed_form_alpha(*self.estimates(), count=count)
        self.alpha = min(max(best, self.smallest), 1.0 - self.smallest)

    def estimates(self) -> tuple[float, float, float, float]:
        """Return the averaged moments, 0 before the first update."""
        known = 1 - self.decay**self.updates if self.updates else 1.0
        first, second, third, fourth = (average / known for average in self.averages)
        return first, second, third, fourth

    def state(self) -> dict[str, float | list[float]]:
        """Return what a checkpoint must hold."""
        return {"alpha": self.alpha, "updates": self.updates, "averages": list(self.averages)}

    def load(self, state: dict[str, float | list[float]]) -> None:
        """Take over what a checkpoint held."""
        self.alpha = float(state["alpha"])  # type: ignore[arg-type]
        self.updates = int(state["updates"])  # type: ignore[arg-type]
        self.averages = [float(value) for value in state["averages"]]  # type: ignore[union-attr]
