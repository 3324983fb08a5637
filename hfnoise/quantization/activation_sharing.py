"""One quantisation of an input for all layers that read it: query, key and value; gate and up."""

from __future__ import annotations

import torch
from torch import Tensor

from hfnoise.quantization.linear_function import QuantizeActivation
from hfnoise.quantization.row_quantizer import RowQuantizer

# The result lives on the input itself, as an attribute: as long as the input, and no longer.
_ATTRIBUTE = "_hfnoise_quantized"


def quantized_activation(x: Tensor, settings: RowQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Return points, codes and step of the rows of `x`, those of an earlier call for the same tensor if there was one.

    Nothing is shared for a leaf that takes a gradient (its result would hold it alive, and it the result), for a
    tensor that was changed in place since, or while a graph is traced or compiled.

    Args:
        x (`torch.Tensor` of shape `(..., length)`, floating).
        settings ([`RowQuantizer`]).

    Returns:
        `tuple` of three tensors, with rows flattened: see [`QuantizeActivation`].

    Example:
        >>> import torch
        >>> from hfnoise.quantization.activation_sharing import quantized_activation
        >>> from hfnoise.quantization.row_quantizer import row_quantizer
        >>> x = torch.randn(2, 3, 8)
        >>> settings = row_quantizer(x, bits=2)
        >>> quantized_activation(x, settings)[0] is quantized_activation(x, settings)[0]
        True
    """
    if torch.compiler.is_compiling() or (x.is_leaf and x.requires_grad) or type(x) is not Tensor or x.is_inference():
        return _quantized(x, settings)
    key = (settings, x._version, torch.is_grad_enabled())
    known = getattr(x, _ATTRIBUTE, None)
    if known is None or known[0] != key:
        known = (key, _quantized(x, settings))
        setattr(x, _ATTRIBUTE, known)
    return known[1]


def _quantized(x: Tensor, settings: RowQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    return QuantizeActivation.apply(x.reshape(-1, x.shape[-1]), *settings)  # type: ignore[no-any-return, no-untyped-call]
