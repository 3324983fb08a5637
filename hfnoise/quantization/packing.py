"""Codes of 1 to 8 bits in a row of bytes: a little-endian bit stream, and five ternary digits a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from hfnoise.quantization.grids import TERNARY_BITS, grid_for

_TRITS_PER_BYTE = 5  # 3^5 = 243 <= 256: 1.6 bits each
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def packed_length(length: int, bits: float) -> int:
    """Return the bytes that a row of `length` codes takes: ceil(length * bits / 8), or ceil(length / 5) if ternary.

    Example:
        >>> from hfnoise.quantization import packed_length
        >>> packed_length(4096, 1), packed_length(10, 3), packed_length(11, 1.58)
        (512, 4, 3)
    """
    grid_for(bits)
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise ValueError(f"length is {length!r}; give the number of codes in a row, 0 or more.")
    return -(-length // _TRITS_PER_BYTE) if bits == TERNARY_BITS else -(-length * int(bits) // 8)


def pack(codes: Tensor, bits: float) -> Tensor:
    """Return the codes of each row as bytes.

    Version 1 of the format: code j of a row fills bits j b to j b + b - 1 of a little-endian stream. At 1, 2, 4 and 8
    bits that is bits (j mod 8/b) b of byte j b / 8; at 3, 5, 6 and 7, eight codes fill b bytes. The ternary width
    packs five digits a byte, sum_i code_i 3^i. Unused bits are 0.

    Args:
        codes (`torch.Tensor` of shape `(..., length)`, uint8 or another integer dtype): 0 .. levels - 1.
        bits (`int` or `float`): 1 to 8, or 1.58 (ternary).

    Returns:
        `torch.Tensor` of shape `(..., packed_length(length, bits))`, uint8.

    Raises:
        TypeError: if codes are no integers.
        ValueError: if one does not fit into `bits`, for another width, or if there is no dimension.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import pack
        >>> pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8), bits=1).tolist()
        [129, 1]
    """
    levels = grid_for(bits).levels
    if codes.dtype not in _INTEGERS:
        raise TypeError(f"codes are {codes.dtype}; give integers, such as the uint8 codes of encode.")
    if codes.ndim == 0:
        raise ValueError("codes have no dimension; rows of codes are packed along the last one.")
    if codes.numel() and not codes.is_meta:
        lowest, highest = (int(bound) for bound in codes.aminmax())
        if lowest < 0 or highest >= levels:
            raise ValueError(f"codes are {lowest} to {highest}; {bits} bits hold 0 to {levels - 1}.")
    length = packed_length(codes.shape[-1], bits)
    group = _TRITS_PER_BYTE if bits == TERNARY_BITS else 8
    grouped = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % group))
    grouped = grouped.reshape(*grouped.shape[:-1], grouped.shape[-1] // group, group)
    if bits == TERNARY_BITS:
        packed = grouped[..., -1].clone()
        for digit in reversed(range(_TRITS_PER_BYTE - 1)):
            packed.mul_(3).add_(grouped[..., digit])
        return packed
    packed = grouped.new_zeros(*grouped.shape[:-1], int(bits))
    for code, (byte, shift) in enumerate(_places(int(bits))):
        packed[..., byte] |= grouped[..., code] << shift  # what leaves the byte on the left is dropped
        if shift + bits > 8:
            packed[..., byte + 1] |= grouped[..., code] >> (8 - shift)
    return packed.flatten(-2)[..., :length].contiguous()


def unpack(packed: Tensor, bits: float, length: int | None = None) -> Tensor:
    """Return the codes of rows that [`pack`] made.

    Args:
        packed (`torch.Tensor` of shape `(..., packed_length(length, bits))`, uint8).
        bits (`int` or `float`): the width they were packed with.
        length (`int`, *optional*): codes in a row. By default as many as the bytes hold, which is what was packed if
            they were a multiple of 8 (of 5 at the ternary width); of other lengths the last may be unused bits, 0.

    Returns:
        `torch.Tensor` of shape `(..., length)`, uint8.

    Raises:
        TypeError: if `packed` is not uint8.
        ValueError: if its rows have another number of bytes, or bytes that [`pack`] does not write.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import unpack
        >>> unpack(torch.tensor([129, 1], dtype=torch.uint8), bits=1, length=9).tolist()
        [1, 0, 0, 0, 0, 0, 0, 1, 1]
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed is {packed.dtype}; give the uint8 bytes that pack returned.")
    if length is None:
        grid_for(bits)
        row = packed.shape[-1] if packed.ndim else 0
        length = row * _TRITS_PER_BYTE if bits == TERNARY_BITS else row * 8 // int(bits)
    expected = packed_length(length, bits)
    if packed.ndim == 0 or packed.shape[-1] != expected:
        raise ValueError(
            f"packed has shape {tuple(packed.shape)}; {length} codes of {bits} bits take {expected} bytes a row."
        )
    codes = _unpack_trits(packed) if bits == TERNARY_BITS else _unpack_bits(packed, int(bits))
    if not (codes.is_meta or torch.compiler.is_compiling()) and bool(codes[..., length:].any()):
        raise ValueError(f"packed holds codes beyond length={length}: wrong bits or length, or damaged data.")
    return codes[..., :length].contiguous()


def _unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Return all codes in the bytes, those of the padding included."""
    grouped = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits))
    grouped = grouped.reshape(*grouped.shape[:-1], grouped.shape[-1] // bits, bits)
    codes = grouped.new_empty(*grouped.shape[:-1], 8)
    for code, (byte, shift) in enumerate(_places(bits)):
        value = grouped[..., byte] >> shift
        if shift + bits > 8:
            value |= grouped[..., byte + 1] << (8 - shift)
        codes[..., code] = value.bitwise_and_(2**bits - 1)
    return codes.flatten(-2)


def _places(bits: int) -> list[tuple[int, int]]:
    """Return the byte and the bit in it where each of eight codes begins."""
    return [divmod(code * bits, 8) for code in range(8)]


def _unpack_trits(packed: Tensor) -> Tensor:
    if packed.numel() and not packed.is_meta and int(packed.max()) >= 3**_TRITS_PER_BYTE:
        raise ValueError(f"packed holds bytes up to {int(packed.max())}; five ternary digits are at most 242.")
    powers = 3 ** torch.arange(_TRITS_PER_BYTE, device=packed.device)
    digits = (torch.arange(256, device=packed.device)[:, None] // powers % 3).to(torch.uint8)
    return digits[packed.int()].flatten(-2)
