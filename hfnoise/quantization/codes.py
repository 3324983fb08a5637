"""Integer codes of quantised rows, for export and inference, and the way back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hfnoise.quantization.grids import grid_for
from hfnoise.quantization.hadamard import hadamard_rotate
from hfnoise.quantization.row_quantizer import row_quantizer
from hfnoise.quantization.rows import decoded_rows, quantized_rows


class Encoded(NamedTuple):
    """What [`encode`] returns: `codes`, `scale` and `mask`. The quantised value is (codes - (N - 1) / 2) * scale."""

    codes: Tensor
    scale: Tensor
    mask: Tensor


@torch.no_grad()
def encode(
    x: Tensor,
    bits: float,
    estimator: str = "quest",
    hadamard_group: int | None = 128,
    grid: str = "exact",
    trust_factor: float | None = None,
    *,
    trust_radius: float | None = None,
) -> Encoded:
    """Return the codes and scales of what [`hfnoise.quantization.quantize`] returns, and its mask.

    By the same function, so `decode(codes, scale, bits, rotate_back=False)` equals `quantize(x, bits)` bit by bit.

    Args:
        x, bits, estimator, hadamard_group, grid, trust_factor, trust_radius: those of `quantize`.

    Returns:
        [`Encoded`], which unpacks as `codes, scale, mask`: codes in uint8, 0 .. levels - 1, of the shape of `x`, in
        the rotated space; the step of each row, step * RMS, float32 (float64 for float64), of shape `(..., 1)`; the
        trust mask, bool, all `True` for the straight-through estimators.

    Raises:
        TypeError: as `quantize`.
        ValueError: as `quantize`; and if rows hold NaN or infinite values, or such that their squares overflow: a
            code cannot say so.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import encode
        >>> codes, scale, mask = encode(torch.tensor([[1.0, -1.0]]), bits=1, hadamard_group=None)
        >>> codes.tolist(), round(scale.item(), 4)
        ([[1, 0]], 1.5958)
    """
    settings = row_quantizer(x, bits, estimator, hadamard_group, grid, trust_factor, trust_radius)
    flat = x.reshape(-1, x.shape[-1])
    _, codes, scale, mask = quantized_rows(flat, settings, points=False)
    assert codes is not None  # asked for by default
    _check_scale(scale, flat)
    mask = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask
    return Encoded(codes.view(x.shape), scale.view(*x.shape[:-1], 1), mask.view(x.shape))


def _check_scale(scale: Tensor, rows: Tensor) -> None:
    if scale.is_meta or bool(scale.isfinite().all()):
        return
    bad = (~scale.isfinite()).nonzero()[:, 0]
    finite = bool(rows[bad].isfinite().all())
    what = f"values up to {float(rows[bad].abs().max()):.1e}, whose squares overflow" if finite else "NaN or infinity"
    named = ", ".join(map(str, bad[:5].tolist())) + (", ..." if len(bad) > 5 else "")
    raise ValueError(
        f"x holds {what} in {len(bad)} of {len(rows)} rows ({named}); a code cannot say so. "
        f"{'Scale the tensor down' if finite else 'Find where training went wrong'} before it is encoded."
    )


def decode(
    codes: Tensor,
    scale: Tensor,
    bits: float,
    hadamard_group: int | None = 128,
    rotate_back: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the values that codes stand for: (codes - (N - 1) / 2) * scale, rotated back.

    Args:
        codes (`torch.Tensor` of shape `(..., length)`, uint8): those of [`encode`].
        scale (`torch.Tensor` of shape `(..., 1)`, float32 or float64): the step of each row.
        bits (`int` or `float`): the width they were encoded with.
        hadamard_group (`int`, *optional*, defaults to 128): the group they were encoded with.
        rotate_back (`bool`, defaults to `True`): leave the rotated space. A linear layer can stay in it.
        dtype (`torch.dtype`, *optional*): of the result, rounded to at the end; by default that of `scale`.

    Returns:
        `torch.Tensor` of shape `(..., length)`.

    Raises:
        TypeError: if codes are not uint8, or scales not floating.
        ValueError: if shapes do not match, or for another width.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import decode
        >>> decode(torch.tensor([[3, 0]], dtype=torch.uint8), torch.tensor([[2.0]]), bits=2, hadamard_group=None)
        tensor([[ 3., -3.]])
    """
    levels = grid_for(bits).levels
    if codes.dtype != torch.uint8 or not scale.dtype.is_floating_point:
        raise TypeError(f"codes are {codes.dtype} and scale is {scale.dtype}; give what encode returned.")
    if codes.ndim == 0 or scale.shape != (*codes.shape[:-1], 1):
        expected = (*codes.shape[:-1], 1)
        raise ValueError(f"scale has shape {tuple(scale.shape)}; codes of {tuple(codes.shape)} need {expected}.")
    flat = decoded_rows(codes.reshape(-1, codes.shape[-1]), levels, scale.reshape(-1, 1), scale.dtype)
    values = flat.view(codes.shape)
    if rotate_back:
        values = hadamard_rotate(values, hadamard_group)
    return values if dtype is None else values.to(dtype)
