"""Exact products of codes of up to 8 bits by torch alone: int8 matrices, and floats where int8 is slow or wrong."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hfnoise.quantization.hadamard import without_autocast

# Below, every integer is a float32.
FLOAT32_INTEGERS = 2**24
# Doubled codes 2c - (N - 1) fit into int8 up to here.
_INT8_LEVELS = 2**7
# torch._int_mm on a GPU takes more than 16 rows, and multiples of 8 in both other dimensions.
_MULTIPLE, _GPU_ROWS = 8, 32


def int8_operand(codes: Tensor, levels: int) -> Tensor:
    """Return 2c - (levels - 1), or c - 128 for 256 levels, as int8 rows, which zeros extend to a multiple of 8.

    A new tensor whose strides are those of its shape, always: with another stride of a dimension of size 1 (rows of
    one entry, a row that was cut out) torch._int_mm returns what happens to lie in memory (pytorch issue 195066).

    Example:
        >>> import torch
        >>> from hfnoise.quantization.kernels.int8_product import int8_operand
        >>> int8_operand(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), 4).tolist()
        [[-3, -1, 1, 3, 0, 0, 0, 0]]
    """
    rows, length = codes.shape
    operand = torch.empty(rows, -(-length // _MULTIPLE) * _MULTIPLE, dtype=torch.int8, device=codes.device)
    operand[:, length:] = 0
    filled = operand[:, :length]
    if levels > _INT8_LEVELS:
        torch.bitwise_xor(codes.view(torch.int8), -128, out=filled)
    else:
        torch.mul(codes.view(torch.int8), 2, out=filled).sub_(levels - 1)  # 2c may wrap round, and comes back
    return operand


def multiply_int8(
    operand_x: Tensor, operand_w: Tensor, levels: tuple[int, int], length: int, row_sums_w: Tensor | None
) -> Tensor:
    """Return sum_k (2 x - (N_x - 1)) (2 w - (N_w - 1)) as int32, from [`int8_operand`]s.

    A code of 8 bits is 2c - 255 = 2 (c - 128) + 1, and the ones are row sums: with both operands of 8 bits the sum is
    4 C + 2 (row sum of x + row sum of w) + K, C the product of int8 matrices.

    Args:
        operand_x, operand_w (`torch.Tensor` of shapes `(tokens, padded)` and `(rows, padded)`, int8).
        levels: of inputs and weights.
        length (`int`): codes in a row.
        row_sums_w (`torch.Tensor` of shape `(rows,)`, int32): of `operand_w`; needed if inputs have 8 bits.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.kernels.int8_product import int8_operand, multiply_int8
        >>> x, w = (int8_operand(torch.tensor([[code]], dtype=torch.uint8), 256) for code in (255, 0))
        >>> multiply_int8(x, w, (256, 256), 1, w.sum(1, dtype=torch.int32)).tolist()
        [[-65025]]
    """
    wide_x, wide_w = (count > _INT8_LEVELS for count in levels)
    sums = _int_mm(operand_x, operand_w)
    if wide_x and wide_w:
        sums.mul_(4).add_(length)
    elif wide_x or wide_w:
        sums.mul_(2)
    if wide_x:
        if row_sums_w is None:
            raise ValueError("row_sums_w is None; inputs of 8 bits need the row sums of the weight.")
        sums.add_(row_sums_w, alpha=2 if wide_w else 1)
    if wide_w:
        sums.add_(operand_x.sum(1, dtype=torch.int32, keepdim=True), alpha=2 if wide_x else 1)
    return sums


def multiply_floats(codes_x: Tensor, codes_w: Tensor, levels: tuple[int, int]) -> Tensor:
    """Return the same from codes, by float32 products of so many columns that every sum is exact.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.kernels.int8_product import multiply_floats
        >>> multiply_floats(torch.tensor([[0, 3]], dtype=torch.uint8), torch.ones(1, 2, dtype=torch.uint8), (4, 2))
        tensor([[0]], dtype=torch.int32)
    """
    columns = (FLOAT32_INTEGERS - 1) // ((levels[0] - 1) * (levels[1] - 1))
    sums: Tensor | None = None
    with without_autocast(codes_x.device.type):
        for start in range(0, codes_x.shape[1], columns):
            odd_x = codes_x[:, start : start + columns].float().mul_(2).sub_(levels[0] - 1)
            odd_w = codes_w[:, start : start + columns].float().mul_(2).sub_(levels[1] - 1)
            part = (odd_x @ odd_w.T).int()
            sums = part if sums is None else sums.add_(part)
    if sums is None:
        raise ValueError("rows of codes need at least one entry.")
    return sums


def _int_mm(operand_x: Tensor, operand_w: Tensor) -> Tensor:
    if operand_x.device.type == "cpu":
        return torch._int_mm(operand_x, operand_w.T)
    tokens, rows = len(operand_x), len(operand_w)
    more_tokens, more_rows = max(_GPU_ROWS - tokens, 0), -rows % _MULTIPLE
    if more_tokens:
        operand_x = torch.cat([operand_x, operand_x.new_zeros(more_tokens, operand_x.shape[1])])
    if more_rows:
        operand_w = torch.cat([operand_w, operand_w.new_zeros(more_rows, operand_w.shape[1])])
    return torch._int_mm(operand_x, operand_w.T)[:tokens, :rows].contiguous()


@cache
def int8_is_fast_and_exact(device: torch.device) -> bool:
    """Return whether int8 products are to be used on a device: found out once, on the operands that are hardest.

    Processors without VNNI add pairs of products in 16 bits, which overflow (pytorch issue 136746; since 2.6 torch
    takes plain loops there, which are right and slow).

    Example:
        >>> import torch
        >>> from hfnoise.quantization.kernels.int8_product import int8_is_fast_and_exact
        >>> int8_is_fast_and_exact(torch.device("meta"))
        False
    """
    if device.type == "cpu":
        supports_vnni = getattr(torch.cpu, "_is_vnni_supported", None)  # private, but in every torch since 2.5
        if supports_vnni is None or not supports_vnni():
            return False
    elif device.type != "cuda":
        return False
    try:
        for tokens in (1, 40):
            x = torch.full((tokens, 264), 127, dtype=torch.int8, device=device)
            w = torch.full((48, 264), -128, dtype=torch.int8, device=device)
            w[::2] = 127
            expected = torch.full((tokens, 48), -128 * 127 * 264, dtype=torch.int32, device=device)
            expected[:, ::2] = 127 * 127 * 264
            if not torch.equal(_int_mm(x, w), expected):
                return False
    except RuntimeError:  # of an old GPU: not supported
        return False
    return True
