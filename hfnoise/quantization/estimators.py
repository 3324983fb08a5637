"""Gradient estimators through quantisation: QuEST's trust mask, and the straight-through baselines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hfnoise.quantization.row_quantizer import RowQuantizer, row_quantizer
from hfnoise.quantization.rows import masked_and_rotated, quantized_rows


class QuestFunction(torch.autograd.Function):
    """QuEST's quantiser (arXiv 2502.05003, section 3, algorithm 1): forward to the grid, backward through the mask.

    Returns the quantised values themselves and the mask, which is all that is kept for the backward pass: one byte an
    entry. (The official code returns m + (q - m).detach(), m = x mask: an ulp off the grid, and three tensors kept.)
    A second derivative raises: that of a step function says nothing. Call [`quantize`] instead of this.
    """

    @staticmethod
    def forward(
        x: Tensor,
        levels: int,
        unit: float,
        group: int,
        absmax: bool,
        trusted_steps: float | None,
        trust_radius: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        settings = RowQuantizer(levels, unit, group, absmax, trusted_steps, trust_radius)
        points, _, _, mask = quantized_rows(x.reshape(-1, x.shape[-1]), settings, codes=False, scaled=True)
        assert points is not None  # asked for by default
        # Not a view, which nobody could change in place afterwards.
        values: Tensor = torch.ops.aten._unsafe_view(points.to(x.dtype), x.shape)
        return values, None if mask is None else mask.view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        ctx.group = inputs[3]
        mask = output[1]
        ctx.masked = mask is not None
        if mask is not None:
            ctx.mark_non_differentiable(mask)
            ctx.save_for_backward(mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_quantized: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """Return (mask * gradient) rotated back, in float32 inside (float64 for float64)."""
        if grad_quantized is None or not (ctx.masked or ctx.group > 1):
            return grad_quantized, None, None, None, None, None, None
        flat = grad_quantized.reshape(-1, grad_quantized.shape[-1])
        mask = ctx.saved_tensors[0].view(flat.shape) if ctx.masked else None
        gradient = masked_and_rotated(flat, mask, ctx.group).to(grad_quantized.dtype)
        return gradient.view(grad_quantized.shape), None, None, None, None, None, None


def quantize(
    x: Tensor,
    bits: float,
    estimator: str = "quest",
    hadamard_group: int | None = 128,
    grid: str = "exact",
    trust_factor: float | None = None,
    *,
    trust_radius: float | None = None,
) -> Tensor:
    """Return the quantised values of each row of `x`, in the rotated space, differentiable in `x`.

    QuEST (arXiv 2502.05003, section 3): a row is rotated by a grouped Hadamard matrix, divided by its root mean square
    and rounded to the levels of `bits`. The gradient is kept where the entry is trusted, and rotated back. A linear
    layer multiplies two such tensors: `(x H) (W H)^T = x W^T`, so nothing has to be rotated back. Scales count as
    constants of the backward pass.

    The trust rule, one for all widths: the gradient of rotated entries |h| <= trust_factor * alpha * RMS is kept, with
    alpha * RMS the outermost level. By default that is half a step beyond it (1 + 1 / (N - 1)), and 1.30 at 1 bit.

    Departures from the official code: exact constants, rows of any length (a shorter group where 128 does not divide
    it), gradients for rows of zeros, values exactly on the grid. All arithmetic is in float32 also under autocast
    (float64 for float64); the result is rounded to the dtype of `x` at the end. It is not checked for NaN ([`encode`]
    does that), and at float16 values above 65504 become infinite.

    Args:
        x (`torch.Tensor` of shape `(..., length)`, floating): every row has its own scale. Tokens, or output channels.
        bits (`int` or `float`): 1 to 8, or 1.58 (ternary).
        estimator (`str`, defaults to `"quest"`): or `"ste"`, the same values with every gradient passed on; or
            `"ste_absmax"`, the same with levels up to the largest magnitude of the row.
        hadamard_group (`int`, *optional*, defaults to 128): upper bound of the group; `None` or 1: no rotation.
        grid (`str`, defaults to `"exact"`): or `"upstream"`, the constants of the official code.
        trust_factor (`float`, *optional*): see above.
        trust_radius (`float`, *optional*): the paper's own form in its place: the gradient is kept where
            |quantised - h| <= trust_radius * RMS. Below half a step it masks edges of cells inside the grid too.

    Returns:
        `torch.Tensor`: shape and dtype of `x`.

    Raises:
        TypeError: if `x` is not floating, or a setting of the wrong type.
        ValueError: for an unknown setting, one that the estimator would ignore, or rows without entries.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import quantize
        >>> x = torch.tensor([[3.0, -0.1, 0.1, -0.2]], requires_grad=True)
        >>> quantize(x, bits=1, hadamard_group=None).sum().backward()
        >>> x.grad.tolist()  # 3.0 lies beyond 1.30 times the outermost level, so it is not trusted
        [[0.0, 1.0, 1.0, 1.0]]
    """
    settings = row_quantizer(x, bits, estimator, hadamard_group, grid, trust_factor, trust_radius)
    return QuestFunction.apply(x, *settings)[0]  # type: ignore[no-any-return, no-untyped-call]


def quantize_with_mask(
    x: Tensor,
    bits: float,
    estimator: str = "quest",
    hadamard_group: int | None = 128,
    grid: str = "exact",
    trust_factor: float | None = None,
    *,
    trust_radius: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return what [`quantize`] does and the trust mask, for metrics: its mean is the trusted fraction.

    Args:
        x, bits, estimator, hadamard_group, grid, trust_factor, trust_radius: those of [`quantize`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: the values and the mask, bool, in the rotated space; `None` for the
        straight-through estimators, which trust everything.

    Raises:
        TypeError: as [`quantize`].
        ValueError: as [`quantize`].

    Example:
        >>> import torch
        >>> from hfnoise.quantization import quantize_with_mask
        >>> quantize_with_mask(torch.tensor([[3.0, -0.1, 0.1, -0.2]]), 1, hadamard_group=None)[1].float().mean().item()
        0.75
    """
    settings = row_quantizer(x, bits, estimator, hadamard_group, grid, trust_factor, trust_radius)
    return QuestFunction.apply(x, *settings)  # type: ignore[no-any-return, no-untyped-call]
