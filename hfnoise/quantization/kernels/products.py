"""Exact integer products of quantised inputs and packed weights, by the fastest route of the machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hfnoise.quantization.grids import grid_for
from hfnoise.quantization.hadamard import computing_dtype
from hfnoise.quantization.kernels import bit_planes
from hfnoise.quantization.kernels.int8_product import (
    FLOAT32_INTEGERS,
    int8_is_fast_and_exact,
    int8_operand,
    multiply_floats,
    multiply_int8,
)  # fmt: skip
from hfnoise.quantization.kernels.selection import library
from hfnoise.quantization.packing import unpack

ROUTES = ("bit_planes", "int8", "float")
_PLANE_BITS = (1, 2)
_INT32_LIMIT = 2**31
_FLOAT16_LIMIT = 2.0**15


@dataclass(frozen=True)
class PreparedWeight:
    """A packed weight in the form that products need, so that nothing is unpacked per call: see [`prepare_weight`].

    Args:
        route (`str`): `"bit_planes"` (compiled kernels; b bits a weight in memory), `"int8"` (`torch._int_mm`; 8 bits)
            or `"float"` (codes, 8 bits, made float in every call).
        operand (`torch.Tensor`): the planes, the int8 matrix or the codes.
        rows, length (`int`): shape of the weight.
        weight_bits, activation_bits (`int` or `float`): widths it was prepared for.
        row_sums (`torch.Tensor`, *optional*): of the int8 matrix, where a width is 8.
    """

    route: str
    operand: Tensor
    rows: int
    length: int
    weight_bits: float
    activation_bits: float
    row_sums: Tensor | None = None


def is_exact_in_float32(length: int, levels_x: int, levels_w: int) -> bool:
    """Return whether every sum of a product is a float32: length (levels_x - 1) (levels_w - 1) < 2^24.

    Only then may a layer take a kernel in the place of a float product: neither depends on the order of the sum, and
    both give the same to the last bit.

    Example:
        >>> from hfnoise.quantization.kernels import is_exact_in_float32
        >>> is_exact_in_float32(4096, 16, 16), is_exact_in_float32(4096, 256, 256)
        (True, False)
    """
    return length * (levels_x - 1) * (levels_w - 1) < FLOAT32_INTEGERS


def route_for(weight_bits: float, activation_bits: float, device: torch.device | str = "cpu") -> str:
    """Return by which of [`ROUTES`] products of these widths are computed: their result is the same.

    Example:
        >>> from hfnoise.quantization.kernels import route_for
        >>> route_for(8, 8, "meta")
        'float'
    """
    device = torch.device(device)
    grid_for(weight_bits), grid_for(activation_bits)
    planes = weight_bits in _PLANE_BITS and activation_bits in _PLANE_BITS
    if planes and device.type == "cpu" and library() is not None:
        return "bit_planes"
    return "int8" if int8_is_fast_and_exact(device) else "float"


def prepare_weight(
    packed: Tensor, weight_bits: float, activation_bits: float, length: int, route: str | None = None
) -> PreparedWeight:
    """Return a packed weight in the form that [`integer_product`] needs.

    Args:
        packed (`torch.Tensor` of shape `(rows, bytes)` or `(1, rows, bytes)`, uint8): version 1 of the file format,
            see `pack`.
        weight_bits, activation_bits (`int` or `float`): 1 to 8, or 1.58.
        length (`int`): codes in a row.
        route (`str`, *optional*): one of [`ROUTES`]; by default the fastest of this machine.

    Returns:
        [`PreparedWeight`], on the device of `packed`.

    Raises:
        TypeError: if `packed` is not uint8.
        ValueError: for another shape or width, a sum that int32 cannot hold, damaged data, or a route that this
            machine or these widths do not have.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import pack
        >>> from hfnoise.quantization.kernels import prepare_weight
        >>> packed = pack(torch.ones(2, 9, dtype=torch.uint8), 4)
        >>> prepare_weight(packed, weight_bits=4, activation_bits=4, length=9).rows
        2
    """
    levels = grid_for(activation_bits).levels, grid_for(weight_bits).levels
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length is {length!r}; give the number of codes in a row, at least 1.")
    if length * (levels[0] - 1) * (levels[1] - 1) >= _INT32_LIMIT:
        raise ValueError(
            f"a sum of {length} products of {activation_bits} and {weight_bits} bits does not fit into int32."
        )
    if packed.ndim == 3 and len(packed) == 1:
        packed = packed[0]
    if packed.ndim != 2:
        raise ValueError(
            f"packed has shape {tuple(packed.shape)}; give rows of bytes: (rows, bytes) or (1, rows, bytes)."
        )
    fastest = route_for(weight_bits, activation_bits, packed.device)
    if route is None:
        route = fastest
    elif route not in ROUTES or (route == "bit_planes" and fastest != route):
        raise ValueError(f"route is {route!r}; these widths on {packed.device} have {fastest!r}, 'int8' and 'float'.")
    rows = len(packed)
    compiled = library() if route == "bit_planes" else None
    if compiled is not None and packed.dtype == torch.uint8:
        expected = -(-length * int(weight_bits) // 8)
        if packed.shape[1] == expected:  # otherwise `unpack` says what is wrong
            operand = bit_planes.weight_planes(compiled, packed, int(weight_bits), length)
            return PreparedWeight(route, operand, rows, length, weight_bits, activation_bits)
    codes = unpack(packed, weight_bits, length)
    if route == "float":
        return PreparedWeight(route, codes, rows, length, weight_bits, activation_bits)
    operand = int8_operand(codes, levels[1])
    sums = operand.sum(1, dtype=torch.int32) if levels[0] > 128 else None
    return PreparedWeight(route, operand, rows, length, weight_bits, activation_bits, sums)


def integer_product(
    codes: Tensor, weight: Tensor | PreparedWeight, weight_bits: float, activation_bits: float
) -> Tensor:
    """Return S[m, n] = sum_k (2 x[m, k] - (N_x - 1)) (2 w[n, k] - (N_w - 1)), exactly.

    Levels are half of these odd (ternary: even) integers, in steps; so a layer's output is S / 4 times both steps.
    Widths of 1 and 2 bits count bits, where the official kernels of QuEST (arXiv 2502.05003) multiply 4-bit integers
    on a GPU; the others take int8 products. Every route returns the same integers.

    Args:
        codes (`torch.Tensor` of shape `(tokens, length)`, uint8): of the inputs, 0 .. N_x - 1.
        weight ([`PreparedWeight`] or `torch.Tensor` of shape `(rows, bytes)`, uint8): what [`prepare_weight`] returns,
            or packed bytes, which are then prepared in every call.
        weight_bits, activation_bits (`int` or `float`): 1 to 8, or 1.58.

    Returns:
        `torch.Tensor` of shape `(tokens, rows)`, int32.

    Raises:
        TypeError: if codes are not uint8.
        ValueError: if shapes, widths or devices do not fit together, or a code does not fit into its width.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import pack
        >>> from hfnoise.quantization.kernels import integer_product
        >>> codes_x, codes_w = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 3, 3]])
        >>> integer_product(codes_x.byte(), pack(codes_w, 2), weight_bits=2, activation_bits=1).tolist()
        [[-3]]
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes are {codes.dtype}; give uint8, as encode returns them.")
    if codes.ndim != 2 or codes.shape[1] == 0:
        raise ValueError(
            f"codes have shape {tuple(codes.shape)}; give (tokens, length), with at least one entry a row."
        )
    if not isinstance(weight, PreparedWeight):
        weight = prepare_weight(weight, weight_bits, activation_bits, codes.shape[1])
    if (weight.weight_bits, weight.activation_bits) != (weight_bits, activation_bits):
        raise ValueError(
            f"weight was prepared for weight_bits={weight.weight_bits}, activation_bits={weight.activation_bits}; "
            f"the product is of {weight_bits} and {activation_bits}."
        )
    if codes.shape[1] != weight.length or codes.device != weight.operand.device:
        raise ValueError(
            f"codes have rows of {codes.shape[1]} on {codes.device}; the weight's have {weight.length} on "
            f"{weight.operand.device}."
        )
    if weight.route == "bit_planes":
        compiled = library()
        if compiled is not None:
            return bit_planes.product(compiled, codes, int(activation_bits), weight.operand, weight.rows)
    levels = grid_for(activation_bits).levels, grid_for(weight_bits).levels
    if levels[0] < 256 and codes.numel() and int(codes.max()) >= levels[0]:
        raise ValueError(f"codes go up to {int(codes.max())}; {activation_bits} bits hold 0 to {levels[0] - 1}.")
    if weight.route == "float":
        return multiply_floats(codes, weight.operand, levels)
    return multiply_int8(int8_operand(codes, levels[0]), weight.operand, levels, weight.length, weight.row_sums)


def kernel_for(
    length: int, weight_bits: float, activation_bits: float, device: torch.device | str = "cpu"
) -> Callable[[Tensor, PreparedWeight], Tensor] | None:
    """Return the product that a layer may use in the place of its float product, or `None` where it must not.

    Not where a float32 product rounds, since the bits would change; not where nothing is faster than floats; and not
    while a graph is compiled, which cannot see into the kernels.

    Args:
        length (`int`): entries of a row.
        weight_bits, activation_bits (`int` or `float`): 1 to 8, or 1.58.
        device (`torch.device` or `str`, defaults to `"cpu"`).

    Returns:
        A function of codes and [`PreparedWeight`] that returns what [`integer_product`] does, or `None`.

    Example:
        >>> from hfnoise.quantization.kernels import kernel_for
        >>> kernel_for(4096, weight_bits=8, activation_bits=8) is None
        True
    """
    levels = grid_for(activation_bits).levels, grid_for(weight_bits).levels
    if torch.compiler.is_compiling() or not is_exact_in_float32(length, *levels):
        return None
    if route_for(weight_bits, activation_bits, device) == "float":
        return None
    return partial(integer_product, weight_bits=weight_bits, activation_bits=activation_bits)


def level_sums(sums: Tensor, length: int, levels: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the sums of products of levels, S / 4, as the float product in `dtype` would have rounded them.

    The counterpart of `exact_product` in `hfnoise/quantization/linear_function.py`: a product in a half precision is
    added up in float32 and rounded once, and one in float16 is scaled by a power of two before.

    Args:
        sums (`torch.Tensor`, int32): of [`integer_product`].
        length (`int`): entries of a row.
        levels: of inputs and weights.
        dtype (`torch.dtype`): that the layer computes in.

    Returns:
        `torch.Tensor`: in float32 (float64 for float64).

    Example:
        >>> import torch
        >>> from hfnoise.quantization.kernels import level_sums
        >>> level_sums(torch.tensor([[-3]], dtype=torch.int32), 3, (2, 4), torch.float32)
        tensor([[-0.7500]])
    """
    floats = sums.to(computing_dtype(dtype)).mul_(0.25)
    if dtype in (torch.float32, torch.float64):
        return floats
    if dtype != torch.float16:
        return floats.to(dtype).float()
    largest = length * (levels[0] - 1) * (levels[1] - 1) / 4
    power = 2.0 ** max(0, math.ceil(math.log2(largest / _FLOAT16_LIMIT)))
    return floats.div_(power).half().float().mul_(power)
