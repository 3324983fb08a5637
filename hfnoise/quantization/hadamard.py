"""The grouped Hadamard rotation: it spreads outliers over a group, so that a row looks normal to a uniform grid."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Up to this size one product with the whole matrix is fastest; above it, on a CPU, two with Kronecker factors are:
# 128 takes 1.0 ns an entry as 8 x 16, and 1.8 ns at once.
_DIRECT_GROUP = 64
_MATRICES: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
_WARNED_LENGTHS: set[int] = set()


def hadamard_matrix(
    size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, normalized: bool = True
) -> Tensor:
    """Return the Hadamard matrix in Sylvester's (natural) order: symmetric, and its own inverse if normalised.

    Departure from the official code of QuEST, which rounds 2**-3.5 to bfloat16 also for float32 inputs, so that
    H H^T = 0.99979 I: here the entries are exact to the dtype.

    Args:
        size (`int`): a power of two.
        dtype (`torch.dtype`, defaults to `torch.float32`).
        device (`torch.device` or `str`, defaults to `"cpu"`).
        normalized (`bool`, defaults to `True`): divide by sqrt(size); otherwise entries are +1 and -1.

    Returns:
        `torch.Tensor` of shape `(size, size)`.

    Raises:
        ValueError: if `size` is not a power of two.

    Example:
        >>> from hfnoise.quantization import hadamard_matrix
        >>> hadamard_matrix(2, normalized=False).tolist()
        [[1.0, 1.0], [1.0, -1.0]]
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"size is {size}; a Hadamard matrix in Sylvester's order needs a power of two.")
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size) if normalized else matrix


def effective_hadamard_group(length: int, hadamard_group: int | None = 128) -> int:
    """Return the group that rows of `length` entries are rotated in: the largest power of two that divides `length`.

    Departure from the official code, which works for multiples of 128 only. Rows are not padded: zeros would change
    their RMS and their size in memory.

    Args:
        length (`int`): entries of a row, at least 1.
        hadamard_group (`int`, *optional*, defaults to 128): upper bound of the group. `None`, 0 or 1: no rotation.

    Returns:
        `int`: 1 stands for no rotation. Odd lengths are not rotated either, and warn of that once per length.

    Raises:
        TypeError: if `hadamard_group` is no whole number.
        ValueError: if it is negative.

    Example:
        >>> from hfnoise.quantization import effective_hadamard_group
        >>> effective_hadamard_group(4096), effective_hadamard_group(96), effective_hadamard_group(4096, None)
        (128, 32, 1)
    """
    if hadamard_group is None:
        return 1
    if isinstance(hadamard_group, bool) or not isinstance(hadamard_group, int):
        raise TypeError(f"hadamard_group is {hadamard_group!r}; give a whole number, or None for no rotation.")
    if hadamard_group < 0:
        raise ValueError(f"hadamard_group is {hadamard_group}; give a positive number, or None for no rotation.")
    if hadamard_group <= 1:
        return 1
    group = min(length & -length, 1 << (hadamard_group.bit_length() - 1))
    if group == 1 and length > 1:
        _warn_odd(length)
    return group


def _warn_odd(length: int) -> None:
    if torch.compiler.is_compiling() or length in _WARNED_LENGTHS:
        return
    _WARNED_LENGTHS.add(length)
    warnings.warn(
        f"Rows of {length} entries (an odd number) cannot be rotated by a Hadamard matrix and are quantised as they "
        "are: outliers cost more there. hadamard_group=None says so on purpose.",
        stacklevel=4,
    )


def hadamard_rotate(x: Tensor, hadamard_group: int | None = 128) -> Tensor:
    """Return the rows of `x` rotated in groups by the orthonormal Hadamard matrix; twice gives `x` back.

    QuEST (arXiv 2502.05003, section 3) rotates weights and inputs of a linear layer alike, which leaves their product
    as it is. Differentiable. Computed in float32 (float64 for float64), also under autocast, and rounded to the dtype
    of `x` at the end. (On a GPU with `torch.backends.cuda.matmul.allow_tf32` products are as coarse as TF32 is.)

    Args:
        x (`torch.Tensor` of shape `(..., length)`, floating).
        hadamard_group (`int`, *optional*, defaults to 128): see [`effective_hadamard_group`].

    Returns:
        `torch.Tensor`: shape and dtype of `x`; `x` itself if the group is 1.

    Raises:
        TypeError: if `x` is not floating.
        ValueError: if `x` has no dimension, or rows without entries.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import hadamard_rotate
        >>> hadamard_rotate(torch.tensor([2.0, 0.0, 0.0, 0.0])).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    check_rows(x)
    group = effective_hadamard_group(x.shape[-1], hadamard_group)
    return x if group == 1 else _Rotation.apply(x, group)  # type: ignore[no-untyped-call]


class _Rotation(torch.autograd.Function):
    """Its own inverse and transpose, so also its own backward pass; keeps nothing."""

    @staticmethod
    def forward(x: Tensor, group: int) -> Tensor:
        from hfnoise.quantization.rows import masked_and_rotated  # which needs this module

        rotated = masked_and_rotated(x.reshape(-1, x.shape[-1]), None, group).to(x.dtype)
        # Not a view, which nobody could change in place afterwards.
        return torch.ops.aten._unsafe_view(rotated, x.shape)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Rotation.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]


def check_rows(x: Tensor) -> None:
    """Raise unless `x` is a floating tensor whose last dimension has entries.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.hadamard import check_rows
        >>> check_rows(torch.zeros(2, 3))
    """
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        given = f"of dtype {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(f"x is {given}; give a tensor of float16, bfloat16, float32 or float64.")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; rows (the last dimension) need at least one entry.")


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for every other dtype.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.hadamard import computing_dtype
        >>> computing_dtype(torch.bfloat16)
        torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate_into(out: Tensor, x: Tensor, group: int, scratch: Tensor) -> Tensor:
    """Write `x`, rotated in groups of `group`, into `out` and return it.

    Unchecked: all three tensors are contiguous, of one shape and dtype, and none is another; `group` is a power of two
    above 1 that divides the rows. Into given memory, because fresh memory costs more than the arithmetic.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.hadamard import rotate_into
        >>> rotate_into(torch.empty(2, 2), torch.eye(2), 2, torch.empty(2, 2)).sum(0).tolist()
        [1.41421..., 0.0]
    """
    inner = group
    if group > _DIRECT_GROUP and x.device.type == "cpu":
        # H_outer (x) H_inner is the Hadamard matrix of the product: entry (i, j) of a group lies at i * inner + j.
        outer = 1 << ((group.bit_length() - 1) // 2)
        inner = group // outer
        groups = x.view(-1, outer, inner)
        left = _matrix(outer, x).expand(len(groups), outer, outer)
        x = torch.bmm(left, groups, out=scratch.view(-1, outer, inner))
    torch.mm(x.view(-1, inner), _matrix(inner, x), out=out.view(-1, inner))
    return out


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which products keep their dtype.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.hadamard import without_autocast
        >>> with torch.autocast("cpu"), without_autocast("cpu"):
        ...     (torch.eye(2) @ torch.eye(2)).dtype
        torch.float32
    """
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _matrix(size: int, x: Tensor) -> Tensor:
    """Return the normalised matrix for products with `x`, made once per size, dtype and device."""
    if torch.compiler.is_compiling():
        return hadamard_matrix(size, x.dtype, x.device)
    key = (size, x.dtype, x.device)
    if key not in _MATRICES:
        with torch.inference_mode(False):  # an inference tensor could not be saved for a backward pass later
            matrix = hadamard_matrix(size, x.dtype, x.device)
        if type(matrix) is not Tensor:  # of a tracing mode: it must not outlive it
            return matrix
        _MATRICES[key] = matrix
    return _MATRICES[key]
