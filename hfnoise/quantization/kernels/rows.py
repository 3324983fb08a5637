"""Rows onto a grid, and gradients through the mask, by the compiled kernels: what passes between tensors and C."""

from __future__ import annotations

import torch
from torch import Tensor

from hfnoise.quantization.kernels.library import Library
from hfnoise.quantization.row_quantizer import RowQuantizer

# Of rows.cpp: larger groups and other lengths are left to torch.
_GROUPS, _LANES = (1, 16, 32, 64, 128), 16
# Entries: about 100 us on one thread with AVX-512. To start a thread takes 20 us.
_WORTH_THREADS = 2**17


def serves(x: Tensor, group: int) -> bool:
    """Return whether the kernels know the group and the length of the rows; the same for all rows of a layer."""
    length = x.shape[-1]
    return x.device.type == "cpu" and group in _GROUPS and length % _LANES == 0 and length > 0


def quantize(
    library: Library,
    x: Tensor,
    settings: RowQuantizer,
    points: Tensor | None,
    scaled: bool,
    codes: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Write the rows of `x` on the grid into what is given; return the step of each row.

    Args:
        library ([`Library`]).
        x (`torch.Tensor` of shape `(rows, length)`, float32, contiguous): of a shape that [`serves`].
        settings ([`RowQuantizer`]): by the RMS, with no trust radius.
        points (`torch.Tensor`, *optional*): of the shape of `x`, float32, contiguous.
        scaled (`bool`): write points * step in their place.
        codes, mask (`torch.Tensor`, *optional*): of the shape of `x`, uint8 and bool, contiguous.

    Returns:
        `torch.Tensor` of shape `(rows, 1)`, float32.
    """
    rows, length = x.shape
    step = torch.empty(rows, 1, dtype=torch.float32, device="cpu")  # whatever torch's defaults are: C writes it
    trusted = settings.trusted_steps if settings.trusted_steps is not None else 0.0
    status = library.functions.hfnoise_quantize_rows(
        x.data_ptr(), rows, length, settings.group, settings.levels, settings.unit, trusted,
        _address(points), scaled, _address(codes), _address(mask), step.data_ptr(), library.level, _threads(x),
    )  # fmt: skip
    _check(status, "hfnoise_quantize_rows")
    return step


def rotate_gradients(library: Library, gradient: Tensor, mask: Tensor | None, group: int, out: Tensor) -> Tensor:
    """Return `out`, with (mask * gradient) rotated in groups; it may be the gradient.

    For float32, contiguous tensors of a shape that [`serves`].
    """
    status = library.functions.hfnoise_rotate_gradients(
        gradient.data_ptr(), _address(mask), *gradient.shape, group, out.data_ptr(), library.level, _threads(gradient)
    )
    _check(status, "hfnoise_rotate_gradients")
    return out


def decode(library: Library, codes: Tensor, levels: int, step: Tensor | None) -> Tensor:
    """Return (codes - (levels - 1) / 2) * step in float32, for a contiguous matrix of codes and a step a row."""
    out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    status = library.functions.hfnoise_decode_rows(
        codes.data_ptr(), _address(step), *codes.shape, (levels - 1) / 2, out.data_ptr(), library.level,
        _threads(codes),
    )  # fmt: skip
    _check(status, "hfnoise_decode_rows")
    return out


def scale(library: Library, sums: Tensor, step_x: Tensor, step_w: Tensor, bias: Tensor | None) -> Tensor:
    """Return `sums`, overwritten by sums step_x step_w^T + bias, for contiguous float32 tensors."""
    status = library.functions.hfnoise_scale_sums(
        sums.data_ptr(), step_x.data_ptr(), step_w.data_ptr(), _address(bias), *sums.shape, library.level,
        _threads(sums),
    )  # fmt: skip
    _check(status, "hfnoise_scale_sums")
    return sums


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _WORTH_THREADS else 1


def _check(status: int, function: str) -> None:
    if status:
        raise RuntimeError(f"{function} refused its arguments (status {status}); this is a fault of hfnoise.")
