"""Learned step size quantisation, the strongest baseline: one step per tensor, trained with the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hfnoise.quantization.grids import grid_for
from hfnoise.quantization.hadamard import check_rows, computing_dtype


class _LsqFunction(torch.autograd.Function):
    """Keeps `x` and `step` for the backward pass: a weight is kept anyway."""

    @staticmethod
    def forward(x: Tensor, step: Tensor, levels: int, step_gradient_scale: float) -> Tensor:
        points = _points(x.to(computing_dtype(x.dtype)) / step, levels)
        return points.mul_(step).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.levels, ctx.step_gradient_scale = inputs[2:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.saved_tensors
        in_steps = x.to(computing_dtype(x.dtype)) / step
        inside = in_steps.abs() <= (ctx.levels - 1) / 2
        grad_step = None
        if ctx.needs_input_grad[1]:
            slope = _points(in_steps, ctx.levels) - in_steps.masked_fill(~inside, 0.0)
            # Summed in the computing dtype, float32 or float64.
            grad_step = (slope * gradient).sum().mul(ctx.step_gradient_scale).to(step.dtype).view(step.shape)
        return (gradient * inside).to(x.dtype), grad_step, None, None


def _points(in_steps: Tensor, levels: int) -> Tensor:
    outermost = (levels - 1) / 2
    if levels % 2:
        return in_steps.round().clamp_(-outermost, outermost)
    return in_steps.floor().clamp_(-outermost - 0.5, outermost - 0.5).add_(0.5)


def lsq_quantize(x: Tensor, step: Tensor, bits: float) -> Tensor:
    """Return `x` on a grid whose step is learned (LSQ, arXiv 1902.08153, eq. 1 to 3).

    As in the official code of QuEST, levels are those of this package, +-1/2, +-3/2 ... steps (-1, 0, 1 if ternary):
    LSQ's own grid has one level more below zero than above. Inside the outermost levels the gradient reaches `x`,
    and that of the step is (quantised - x) / step; outside, the level. The step's gradient is divided by
    sqrt(entries * Qp), Qp = max(N / 2 - 1, 1 / 2) the largest code above zero; the official code has 0 there at 1 bit
    and returns NaN.

    An optimiser such as Adam ignores that factor: give the step a learning rate of its own, since 2e-3 on a step of
    0.02 moves it by 10 % at a time. Not rotated: pass `hadamard_rotate(x)` where that is wanted.

    Args:
        x (`torch.Tensor`, floating): any shape with at least one dimension.
        step (`torch.Tensor` with one entry, floating, above 0): see [`lsq_initial_step`].
        bits (`int` or `float`): 1 to 8, or 1.58 (ternary).

    Returns:
        `torch.Tensor`: shape and dtype of `x`, differentiable in `x` and `step`; computed in float32 (or float64).

    Raises:
        TypeError: if `x` or `step` is not floating.
        ValueError: for another width, or a step with more than one entry.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import lsq_quantize
        >>> lsq_quantize(torch.tensor([0.9, -0.2, 7.0]), torch.tensor(0.5), bits=2).tolist()
        [0.75, -0.25, 0.75]
    """
    check_rows(x)
    levels = grid_for(bits).levels
    if not isinstance(step, Tensor) or not step.dtype.is_floating_point:
        raise TypeError("step is no floating tensor; give one of one entry, such as lsq_initial_step returns.")
    if step.numel() != 1:
        raise ValueError(f"step has shape {tuple(step.shape)}; LSQ learns one step per tensor, so give one entry.")
    scale = 1 / math.sqrt(x.numel() * _largest_code(levels)) if x.numel() else 1.0
    return _LsqFunction.apply(x, step, levels, scale)  # type: ignore[no-any-return, no-untyped-call]


def lsq_initial_step(x: Tensor, bits: float, rule: str = "lsq") -> Tensor:
    """Return the step to begin with: of LSQ, 2 mean|x| / sqrt(Qp), or of the grid that fits the RMS of `x` best.

    Args:
        x (`torch.Tensor`, floating): the tensor (the whole batch) that is going to be quantised.
        bits (`int` or `float`): 1 to 8, or 1.58 (ternary).
        rule (`str`, defaults to `"lsq"`): of arXiv 1902.08153, section 2.1; or `"rms"`, the step of [`grid_for`] times
            the RMS of the whole tensor, which the official code of QuEST calls LSQ+.

    Returns:
        `torch.Tensor`: a scalar in float32 (float64 for float64), without a gradient.

    Raises:
        TypeError: if `x` is not floating.
        ValueError: for another width or rule, or if the step would be 0 or not finite (`x` is zero, or not finite).

    Example:
        >>> import torch
        >>> from hfnoise.quantization import lsq_initial_step
        >>> lsq_initial_step(torch.tensor([1.0, -1.0]), bits=2).item()
        2.0
    """
    check_rows(x)
    grid = grid_for(bits)
    values = x.detach().to(computing_dtype(x.dtype))
    if rule == "lsq":
        step = 2 * values.abs().mean() / math.sqrt(_largest_code(grid.levels))
    elif rule == "rms":
        step = grid.step * values.square().mean().sqrt()
    else:
        raise ValueError(f"rule is {rule!r}; choose 'lsq' (2 mean|x| / sqrt(Qp)) or 'rms' (the best grid).")
    if not step.is_meta and not 0 < float(step) < math.inf:
        raise ValueError(f"the first step would be {float(step)}: x is zero throughout, empty or not finite.")
    return step


def _largest_code(levels: int) -> float:
    """Return LSQ's Qp; one half at 1 bit, where N / 2 - 1 is 0 and its square root a divisor."""
    return 1.0 if levels == 3 else max(levels / 2 - 1, 0.5)
