"""Products of 1- and 2-bit codes by the compiled kernels: what passes between tensors and C."""

from __future__ import annotations

import torch
from torch import Tensor

from hfnoise.quantization.kernels.building import BuildError
from hfnoise.quantization.kernels.library import Library

_WORD, _ROWS = 64, 8  # of the layout in bit_planes.cpp
_DONE, _CODE_TOO_LARGE, _OUT_OF_MEMORY = 0, 1, 2
# Products of pairs of words: about 150 us on one thread with AVX-512. To start a thread takes 20 us.
_WORTH_THREADS = 2**21


def weight_planes(library: Library, packed: Tensor, bits: int, length: int) -> Tensor:
    """Return the bit planes of packed rows, in the layout of the kernels: read [`product`].

    Args:
        library ([`Library`]).
        packed (`torch.Tensor` of shape `(rows, ceil(length bits / 8))`, uint8, on the CPU): see `pack`.
        bits (`int`): 1 or 2.
        length (`int`): codes in a row, at least 1.

    Returns:
        `torch.Tensor` of shape `(ceil(rows / 8), ceil(length / 64), bits, 8)`, int64.

    Raises:
        ValueError: if bits beyond the last code of a row are set.
    """
    packed = packed.contiguous()
    rows = packed.shape[0]
    planes = torch.zeros(-(-rows // _ROWS), -(-length // _WORD), bits, _ROWS, dtype=torch.int64, device="cpu")
    code = library.functions.hfnoise_weight_planes(packed.data_ptr(), rows, length, bits, planes.data_ptr())
    if code == _CODE_TOO_LARGE:
        raise ValueError(f"packed holds codes beyond length={length}: wrong bits or length, or damaged data.")
    _check(code, "hfnoise_weight_planes")
    return planes


def product(library: Library, codes: Tensor, activation_bits: int, planes: Tensor, rows: int) -> Tensor:
    """Return sum_k (2 x - (N_x - 1)) (2 w - (N_w - 1)), exactly, for codes x and rows w of a weight in planes.

    Large products use `torch.get_num_threads()` threads.

    Args:
        library ([`Library`]).
        codes (`torch.Tensor` of shape `(tokens, length)`, uint8, on the CPU).
        activation_bits (`int`): 1 or 2.
        planes (`torch.Tensor`): of [`weight_planes`].
        rows (`int`): of the weight.

    Returns:
        `torch.Tensor` of shape `(tokens, rows)`, int32.

    Raises:
        MemoryError: if there is no room for the planes of the inputs.
        ValueError: if a code does not fit into `activation_bits`.
    """
    sums = torch.empty(len(codes), rows, dtype=torch.int32, device="cpu")
    _multiply(library, codes, activation_bits, planes, rows, (sums, None, None, None, None))
    return sums


def linear(
    library: Library,
    codes: Tensor,
    activation_bits: int,
    planes: Tensor,
    step_x: Tensor,
    step_w: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Return [`product`] / 4 * step_x * step_w + bias in one pass: `scaled` of `level_sums`, to the last bit.

    Args:
        library, codes, activation_bits, planes: those of [`product`].
        step_x (`torch.Tensor` of shape `(tokens, 1)`, float32).
        step_w (`torch.Tensor` of shape `(rows, 1)`, float32).
        bias (`torch.Tensor` of shape `(rows,)`, float32, *optional*).

    Returns:
        `torch.Tensor` of shape `(tokens, rows)`, float32.

    Raises:
        MemoryError, ValueError: as [`product`].
    """
    rows = len(step_w)
    output = torch.empty(len(codes), rows, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
    step_x, step_w = step_x.contiguous(), step_w.contiguous()
    bias = None if bias is None else bias.contiguous()
    _multiply(library, codes, activation_bits, planes, rows, (None, output, step_x, step_w, bias))
    return output


def _multiply(
    library: Library,
    codes: Tensor,
    activation_bits: int,
    planes: Tensor,
    rows: int,
    results: tuple[Tensor | None, ...],
) -> None:
    codes = codes.contiguous()
    tokens, length = codes.shape
    weight_bits = planes.shape[2]
    work = tokens * rows * planes.shape[1] * activation_bits * weight_bits
    threads = torch.get_num_threads() if work >= _WORTH_THREADS else 1
    code = library.functions.hfnoise_bit_plane_product(
        codes.data_ptr(), tokens, length, activation_bits,
        planes.data_ptr(), rows, weight_bits,
        *(None if result is None else result.data_ptr() for result in results), library.level, threads,
    )  # fmt: skip
    if code == _CODE_TOO_LARGE:
        raise ValueError(
            f"codes go up to {int(codes.max())}; {activation_bits} bits hold 0 to {2**activation_bits - 1}."
        )
    _check(code, "hfnoise_bit_plane_product")


def check_library(library: Library) -> None:
    """Raise a BuildError unless a few products are right: a compiler may have its faults, and so may we.

    Takes less than a millisecond.
    """
    with torch.device("cpu"):
        _check_products(library)


def _check_products(library: Library) -> None:
    generator = torch.Generator().manual_seed(0)
    for weight_bits in (1, 2):
        # Odd sizes: more tokens and rows than a tile has, and a last word that is not full.
        weight = torch.randint(0, 256, (11, -(-200 * weight_bits // 8)), dtype=torch.uint8, generator=generator)
        shifts = torch.arange(0, 8, weight_bits, dtype=torch.uint8)
        codes_w = (weight[..., None] >> shifts & (2**weight_bits - 1)).flatten(1)
        planes = weight_planes(library, weight, weight_bits, 200)
        for activation_bits in (1, 2):
            codes_x = torch.randint(0, 2**activation_bits, (7, 200), dtype=torch.uint8, generator=generator)
            odd_x = 2 * codes_x.double() - (2**activation_bits - 1)
            odd_w = 2 * codes_w.double() - (2**weight_bits - 1)
            if not torch.equal(product(library, codes_x, activation_bits, planes, 11).double(), odd_x @ odd_w.T):
                raise BuildError(f"{library.path} computes wrong products")


def _check(code: int, function: str) -> None:
    if code == _OUT_OF_MEMORY:
        raise MemoryError("no room for the bit planes of the inputs; pass fewer tokens at a time.")
    if code != _DONE:
        raise RuntimeError(f"{function} refused its arguments (status {code}); this is a fault of hfnoise.")
