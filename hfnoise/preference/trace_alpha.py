"""BVPO (arXiv 2510.05095): the share of the trace gradient that minimises the error of the mixed gradient."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class TraceAlpha(NamedTuple):
    """The best share of the trace gradient, and the moments it follows from.

    Args:
        alpha (`float`): the share, in [0, 1].
        trace_variance (`float`): trace of the covariance of one gradient with sampled traces.
        empty_variance (`float`): the same without traces.
        covariance (`float`): trace of the covariance between the two.
        squared_bias (`float`): squared norm of the difference of the two expectations, unbiased, so it may be < 0.
    """

    alpha: float
    trace_variance: float
    empty_variance: float
    covariance: float
    squared_bias: float


def closed_form_alpha(
    trace_variance: float, empty_variance: float, covariance: float, squared_bias: float, count: float
) -> float:
    """Return the share of the trace gradient of least mean squared error when `count` gradients are averaged.

    BVPO (arXiv 2510.05095), with the trace gradient taken as unbiased: its expectation is the target. Averaging
    shrinks the variances by `count` and not the bias, so the share grows with it.

    Args:
        trace_variance (`float`): trace of the covariance of one trace gradient.
        empty_variance (`float`): the same of one gradient without traces.
        covariance (`float`): trace of their cross-covariance.
        squared_bias (`float`): squared norm of the difference of the means; negative estimates count as 0.
        count (`float`): gradients averaged in one optimizer step.

    Returns:
        `float`: in [0, 1]; 0.5, plain DPO on both datasets, if the moments are all 0.

    Example:
        >>> from hfnoise.preference.trace_alpha import closed_form_alpha
        >>> closed_form_alpha(4.0, 1.0, 0.0, 1.0, count=1), round(closed_form_alpha(4.0, 1.0, 0.0, 1.0, count=16), 3)
        (0.3333333333333333, 0.81)
    """
    bias = max(squared_bias, 0.0)
    numerator = bias + (empty_variance - covariance) / count
    denominator = bias + (trace_variance + empty_variance - 2 * covariance) / count
    if denominator <= 0:  # a variance: 0 only if both gradients always agree
        return 0.5
    return min(max(numerator / denominator, 0.0), 1.0)


def optimal_trace_alpha(
    trace_grads: Float[Tensor, "count parameters"], empty_grads: Float[Tensor, "count parameters"]
) -> TraceAlpha:
    """Return the share of the trace gradient that minimises the error of the mean over these gradients.

    BVPO (arXiv 2510.05095): alpha g_trace + (1 - alpha) g_empty has the bias of the gradient without traces and the
    variance of the sampled traces; the paper states the optimum and uses 0.5. The moments are unbiased estimates.

    Args:
        trace_grads (`torch.Tensor` of shape `(count, parameters)`, floating): gradients of the loss with traces, one
            row per micro-batch; `count` is at least 2.
        empty_grads (`torch.Tensor` of shape `(count, parameters)`, floating): the same without, on the same prompts.

    Returns:
        [`TraceAlpha`]: the share for the mean of `count` gradients, and the moments of one.

    Raises:
        ValueError: if the shapes differ or there are fewer than 2 gradients.

    Example:
        >>> import torch
        >>> from hfnoise.preference import optimal_trace_alpha
        >>> trace = torch.tensor([[3.0, 0.0], [-1.0, 0.0]])
        >>> round(optimal_trace_alpha(trace, torch.tensor([[5.0, 0.5], [5.0, -0.5]])).alpha, 3)
        0.75
    """
    if trace_grads.shape != empty_grads.shape or trace_grads.dim() != 2 or len(trace_grads) < 2:
        raise ValueError(
            "trace_grads and empty_grads must have one shape (count, parameters) with count >= 2, got "
            f"{tuple(trace_grads.shape)} and {tuple(empty_grads.shape)}."
        )
    trace, empty = trace_grads.detach().double(), empty_grads.detach().double()
    moments = gradient_moments(
        count=len(trace),
        trace_square=float(trace.square().sum()),
        empty_square=float(empty.square().sum()),
        product=float((trace * empty).sum()),
        trace_sum=trace.sum(0),
        empty_sum=empty.sum(0),
    )
    return TraceAlpha(closed_form_alpha(*moments, count=len(trace)), *moments)


def gradient_moments(
    count: int, trace_square: float, empty_square: float, product: float, trace_sum: Tensor, empty_sum: Tensor
) -> tuple[float, float, float, float]:
    """Return variance with traces, variance without, covariance and squared bias from sums over `count` gradients.

    Args:
        count (`int`): number of gradients, at least 2.
        trace_square (`float`): sum of the squared norms with traces.
        empty_square (`float`): the same without.
        product (`float`): sum of the inner products of the two.
        trace_sum (`torch.Tensor` of shape `(parameters,)`): sum of the gradients with traces.
        empty_sum (`torch.Tensor` of shape `(parameters,)`): the same without.
    """
    trace_mean, empty_mean = trace_sum.double() / count, empty_sum.double() / count
    trace_variance = (trace_square - count * float(trace_mean.square().sum())) / (count - 1)
    empty_variance = (empty_square - count * float(empty_mean.square().sum())) / (count - 1)
    covariance = (product - count * float((trace_mean * empty_mean).sum())) / (count - 1)
    difference = float((empty_mean - trace_mean).square().sum())
    noise = (trace_variance + empty_variance - 2 * covariance) / count
    return trace_variance, empty_variance, covariance, difference - noise
