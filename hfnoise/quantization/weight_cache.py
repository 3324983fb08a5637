"""Quantised weights kept between two steps of an optimizer: for gradient accumulation, evaluation and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import register_optimizer_step_post_hook

_state = {"depth": 0}  # of cached_weights that were entered and not left
# The layers that keep something in `quantized_cache`: `(key, value)`.
_holders: WeakSet[Module] = WeakSet()


def forget_quantized_weights(*_: Any, **__: Any) -> None:
    """Drop what is cached; call it after weights were changed by anything but an optimizer or `load_state_dict`.

    Example:
        >>> from hfnoise.quantization.weight_cache import forget_quantized_weights
        >>> forget_quantized_weights()
    """
    for layer in list(_holders):
        layer.quantized_cache = None  # type: ignore[assignment]
    _holders.clear()


def kept_between_steps(layer: Module, tensors: tuple[Tensor, ...], settings: Any, make: Callable[[], Any]) -> Any:
    """Return what `make` makes of the tensors of a layer, kept in it inside of [`cached_weights`].

    `load_state_dict` is told by the version counters, with `assign=True` by the addresses; steps of optimizers by a
    hook, since fused AdamW (the default of the Trainer) and bitsandbytes' leave the counters as they are.

    Example:
        >>> from torch import nn
        >>> from hfnoise.quantization.weight_cache import kept_between_steps
        >>> kept_between_steps(nn.Linear(1, 1), (), None, lambda: 3)
        3
    """
    if not _state["depth"] or any(tensor.is_inference() for tensor in tensors):
        return make()
    # What is made in inference mode could not be saved for a backward pass later.
    mode = torch.is_inference_mode_enabled()
    key = [(tensor.data_ptr(), tensor._version, tensor.device, tensor.dtype) for tensor in tensors], settings, mode
    known = getattr(layer, "quantized_cache", None)
    if known is None or known[0] != key:
        known = (key, make())
        layer.quantized_cache = known  # type: ignore[assignment]
        _holders.add(layer)
    return known[1]


@contextmanager
def cached_weights(model: Module | None = None) -> Iterator[None]:
    """Quantise every weight once, not in every forward, until an optimizer steps.

    Inside, weights change by optimizers and `load_state_dict` only, or [`forget_quantized_weights`] is called. A
    weight takes 6 bytes an entry more (4 of levels, 1 of codes, 1 of the mask), which are freed at the end.

    Args:
        model (`torch.nn.Module`, *optional*): refused if its weights are sharded: FSDP and ZeRO-3 gather them anew.

    Raises:
        ValueError: if a weight of `model` is sharded.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import cached_weights
        >>> with cached_weights(), torch.no_grad():
        ...     pass  # model.generate(...)
    """
    if model is not None:
        for name, parameter in model.named_parameters():
            if (
                hasattr(parameter, "device_mesh")
                or hasattr(parameter, "ds_id")
                or hasattr(parameter, "_is_flat_param")
            ):
                raise ValueError(
                    f"{name} is sharded (FSDP or ZeRO-3): what is cached of it would be another rank's. Leave "
                    "cached_weights out; weights are then quantised in every forward."
                )
    _state["depth"] += 1
    forget_quantized_weights()
    try:
        yield
    finally:
        _state["depth"] -= 1
        forget_quantized_weights()


register_optimizer_step_post_hook(forget_quantized_weights)
