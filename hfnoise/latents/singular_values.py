"""The singular value decomposition of a sample of noise, its channels laid out as the tiles of one matrix."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SIGNS = ("canonical", "lapack")


class NoiseFactors(NamedTuple):
    """M = u diag(s) vh, for each sample; u has the left singular vectors in its columns."""

    u: Tensor
    s: Tensor
    vh: Tensor


def tile_shape(channels: int, tile_rows: int | None = None) -> tuple[int, int]:
    """Return in how many rows and columns the channels are laid out: nearly square by default.

    Raises:
        ValueError: if the rows do not divide the channels.

    Example:
        >>> from hfnoise.latents.singular_values import tile_shape
        >>> [tile_shape(channels) for channels in (4, 8, 16)]
        [(2, 2), (2, 4), (4, 4)]
    """
    if channels < 1:
        raise ValueError(f"latents need a channel, got {channels}.")
    if tile_rows is None:
        tile_rows = next(rows for rows in range(math.isqrt(channels), 0, -1) if channels % rows == 0)
    if tile_rows < 1 or channels % tile_rows:
        raise ValueError(f"tile_rows must divide the {channels} channels, got {tile_rows}.")
    return tile_rows, channels // tile_rows


def tiled(latents: Tensor, tile_rows: int) -> Tensor:
    """Return latents as matrices: channel k is the tile in row k // columns, column k % columns.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`).
        tile_rows (`int`): of tiles.

    Example:
        >>> import torch
        >>> from hfnoise.latents.singular_values import tiled
        >>> tiled(torch.arange(4.0).reshape(1, 4, 1, 1), 2)
        tensor([[[0., 1.],
                 [2., 3.]]])
    """
    batch, channels, height, width = latents.shape
    columns = channels // tile_rows
    tiles = latents.reshape(batch, tile_rows, columns, height, width).transpose(2, 3)
    return tiles.reshape(batch, tile_rows * height, columns * width)


def untiled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Return the latents whose matrix it is.

    Example:
        >>> import torch
        >>> from hfnoise.latents.singular_values import tiled, untiled
        >>> latents = torch.randn(2, 8, 3, 5)
        >>> torch.equal(untiled(tiled(latents, 2), 2, 4), latents)
        True
    """
    batch, height, width = len(matrix), matrix.shape[1] // rows, matrix.shape[2] // columns
    tiles = matrix.reshape(batch, rows, height, columns, width).transpose(2, 3)
    return tiles.reshape(batch, rows * columns, height, width)


def noise_factors(matrix: Tensor, sign: str = "canonical") -> NoiseFactors:
    """Return the factors of matrices, in float32 and without gradient: noise is data.

    A pair (u_i, v_i) is determined up to its sign only, and a network that reads u_i and v_i gives another result for
    the other one. `"canonical"`: the entry of u_i with the largest absolute value is positive, whatever library
    computed it. `"lapack"`: as it comes, which is what the released networks were trained on.

    Args:
        matrix (`torch.Tensor` of shape `(batch, rows, columns)`): of any float dtype.
        sign (`str`, defaults to `"canonical"`): or `"lapack"`.

    Raises:
        ValueError: if an entry is NaN or infinite.

    Example:
        >>> import torch
        >>> from hfnoise.latents.singular_values import noise_factors
        >>> noise_factors(torch.tensor([[[-3.0, 0.0], [0.0, 2.0]]])).u[0].diagonal()
        tensor([1., 1.])
    """
    if sign not in SIGNS:
        raise ValueError(f"sign must be one of {SIGNS}, got {sign!r}.")
    with torch.no_grad():
        matrix = matrix.float()
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("the noise holds NaN or infinity: it has no singular values.")
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        if sign == "canonical":
            largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
            flip = torch.where(largest < 0, -1.0, 1.0)
            u, vh = u * flip, vh * flip.mT
    return NoiseFactors(u, s, vh)


class FactorCache:
    """Remembers the factors of samples by their content; in training the same noises come again each epoch.

    Args:
        max_bytes (`int`, defaults to 1 GiB): of main memory; the samples that were not asked for longest are
            forgotten.

    Raises:
        ValueError: if it is negative.

    Example:
        >>> import torch
        >>> from hfnoise.latents.singular_values import FactorCache, noise_factors
        >>> cache, noise = FactorCache(), torch.randn(3, 4, 4)
        >>> _ = [cache(noise, noise_factors) for _ in range(2)]
        >>> cache.computed
        3
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}.")
        self.max_bytes, self.computed, self._bytes = max_bytes, 0, 0
        self._known: OrderedDict[bytes, NoiseFactors] = OrderedDict()

    def __call__(self, matrix: Tensor, factorize: Callable[[Tensor], NoiseFactors]) -> NoiseFactors:
        """Return the factors of matrices, on their device; those of new ones are computed by `factorize`."""
        here = matrix.detach().to("cpu", torch.float32).contiguous()
        keys = [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in here]
        new = [row for row, key in enumerate(keys) if key not in self._known]
        found = {key: self._known[key] for key in keys if key in self._known}
        if new:
            computed = factorize(matrix[new])
            self.computed += len(new)
            for place, row in enumerate(new):
                # Copies: a view would keep its whole batch in memory.
                found[keys[row]] = NoiseFactors(*(part[place].to("cpu", copy=True) for part in computed))
        for key in keys:
            self._remember(key, found[key])
        rows = [found[key] for key in keys]
        return NoiseFactors(*(torch.stack(part).to(matrix.device) for part in zip(*rows, strict=True)))

    def _remember(self, key: bytes, factors: NoiseFactors) -> None:
        if key not in self._known:
            self._known[key] = factors
            self._bytes += _size(factors)
        self._known.move_to_end(key)
        while self._bytes > self.max_bytes:
            self._bytes -= _size(self._known.popitem(last=False)[1])


def _size(factors: NoiseFactors) -> int:
    return sum(part.numel() * part.element_size() for part in factors)
