"""One quantisation of an input for all layers that read it: query, key and value; gate and up."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hfnoise.quantization.linear_function import QuantizeActivation
from hfnoise.quantization.row_quantizer import RowQuantizer

# As long as the input, and no longer. Not an attribute of it, which copies and files of the input would carry: a copy
# that is changed as often as the original was would take it for its own.
_known = WeakIdKeyDictionary()


def quantized_activation(x: Tensor, settings: RowQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Return points, codes and step of the rows of `x`, those of an earlier call for the same tensor if there was one.

    Nothing is shared for a leaf that takes a gradient (its result would hold it alive, and it the result), for a
    tensor that was changed in place since or whose memory is somebody else's (NumPy's, another process's: what they
    write is not counted), across the border of a checkpointed block (whose second run would save less than its
    first), after a backward pass (which freed what the result had kept), or while a graph is traced or compiled.

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
    if x.device.type == "cpu" and not x.untyped_storage().resizable():
        return _quantized(x, settings)
    key = (settings, x._version, torch.is_grad_enabled(), _saving_hook())
    known: tuple[Any, tuple[Tensor, Tensor, Tensor]] | None = _known.get(x)  # type: ignore[no-untyped-call]
    if known is None or known[0] != key or getattr(known[1][0].grad_fn, "spent", False):
        known = (key, _quantized(x, settings))
        _known[x] = known
    return known[1]


def _saving_hook() -> Any:
    """Return what tells checkpointed blocks apart, and their two runs: each has a hook of its own for saved tensors.

    Weakly, since the hook holds the inputs of its block.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    try:
        return ref(hooks[0])
    except TypeError:  # a kind of function without weak references: equal to nothing
        return object()


def _quantized(x: Tensor, settings: RowQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    return QuantizeActivation.apply(x.reshape(-1, x.shape[-1]), *settings)  # type: ignore[no-any-return, no-untyped-call]
