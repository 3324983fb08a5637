"""Sums over what belongs to one sample, in float32 at least: what all guidance rules are made of.

Only elementwise products and sums are used: autocast would lower a matrix product to 16 bits, and leaves these alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32; float64 stays.

    bfloat16 has 8 bits: a cosine of 0.9902 computed in it is 0.9922, across the paper's threshold of 0.991.

    Example:
        >>> import torch
        >>> from hfnoise.guidance.tensor_math import widened
        >>> widened(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_pair(cond: Tensor, uncond: Tensor) -> None:
    """Raise unless two predictions are floating point, have one shape and a batch dimension.

    Args:
        cond, uncond (`torch.Tensor` of shape `(batch, ...)`): predictions.

    Raises:
        TypeError: if one is no floating-point tensor.
        ValueError: if the shapes differ or have fewer than two dimensions.
    """
    for name, tensor in (("cond", cond), ("uncond", uncond)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor of shape (batch, ...), got {kind}.")
    if cond.shape != uncond.shape or cond.dim() < 2:
        raise ValueError(
            "cond and uncond must have one shape (batch, ...) with at least one dimension beside the batch, got "
            f"{tuple(cond.shape)} and {tuple(uncond.shape)}. A batched output is split first: uncond, cond = "
            "output.chunk(2)."
        )


def sample_dims(tensor: Tensor, dims: Sequence[int] | None) -> tuple[int, ...]:
    """Return the dimensions that are summed over: all but the batch, or those that were asked for.

    Args:
        tensor (`torch.Tensor` of shape `(batch, ...)`): whose dimensions.
        dims (`Sequence[int]`, *optional*): counted from 0, or negative from the end.

    Raises:
        ValueError: if `dims` is empty, names a dimension twice or the batch (0), or one that there is not.

    Example:
        >>> import torch
        >>> from hfnoise.guidance.tensor_math import sample_dims
        >>> sample_dims(torch.ones(2, 3, 4), None), sample_dims(torch.ones(2, 3, 4), [-1])
        ((1, 2), (2,))
    """
    if dims is None:
        return tuple(range(1, tensor.dim()))
    count = tensor.dim()
    places = tuple(dim + count if dim < 0 else dim for dim in dims)
    if not places or len(set(places)) != len(places) or not all(0 < place < count for place in places):
        raise ValueError(
            f"dims must be different dimensions of {tuple(tensor.shape)} other than the batch (dimension 0), got "
            f"{tuple(dims)}. Leave them out to sum over everything that belongs to a sample."
        )
    return places


def inner(left: Tensor, right: Tensor, dims: Sequence[int]) -> Tensor:
    """Return the inner products over `dims`, which are kept with length 1.

    Example:
        >>> import torch
        >>> from hfnoise.guidance.tensor_math import inner
        >>> inner(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]]), (1,)).tolist()
        [[11.0]]
    """
    return (left * right).sum(dim=tuple(dims), keepdim=True)


def norm(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Return the Euclidean norms over `dims`, which are kept with length 1.

    Example:
        >>> import torch
        >>> from hfnoise.guidance.tensor_math import norm
        >>> norm(torch.tensor([[3.0, 4.0]]), (1,)).tolist()
        [[5.0]]
    """
    # Not torch.norm: given three dimensions it takes them for a matrix norm and fails.
    lengths: Tensor = torch.linalg.vector_norm(tensor, dim=tuple(dims), keepdim=True)
    return lengths
