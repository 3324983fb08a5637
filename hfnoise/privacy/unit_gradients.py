"""The gradient of every unit's own loss, in one call: by expanded leaves, or unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfnoise.privacy.gradient_recorder import UnitGradientRecorder

MODES = ("leaf", "loop")
LossFunction = Callable[[nn.Module, Any], Tensor]


def per_unit_gradients(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss_fn: LossFunction,
    *,
    unit: Tensor | None = None,
    mode: str = "leaf",
) -> dict[str, Tensor]:
    """Return the gradient of every unit's loss with respect to every trainable parameter.

    `mode="leaf"` takes one forward and one backward for all units ([`UnitGradientRecorder`]); it is exact if the loss
    is separable, that is if a unit's loss does not depend on the other rows of the batch. `mode="loop"` runs the model
    on one unit after the other and takes any layer: it is what the other is compared with. The parameters' `.grad` are
    left as they are.

    Formal guarantee: none. What is returned are exact functions of private rows; clip it
    ([`~hfnoise.privacy.clip_per_unit`]) and add noise before anything of it is shown.

    Args:
        model (`torch.nn.Module`): the model; its trainable parameters are float32 for `mode="leaf"`.
        batch (`dict`): what `loss_fn` takes. Its tensors have the rows, or the units, as first dimension; what is
            not a tensor is passed on.
        loss_fn (callable): `loss_fn(model, batch)` returns the losses of the units, shape `(units,)`, or their sum;
            not their mean, which would divide every gradient.
        unit (`torch.Tensor` of shape `(rows,)`, int64, *optional*, defaults to one unit per row of the batch): to
            which unit each row belongs that the model sees, from 0 to units - 1. For pairs that `loss_fn` gives to the
            model as `[chosen; rejected]`: `torch.arange(pairs).repeat(2)`.
        mode (`str`, defaults to `"leaf"`): `"leaf"` or `"loop"`.

    Returns:
        `dict[str, torch.Tensor]`: for each trainable parameter, by its name, `(units, *parameter.shape)`, float32 (for
        `"loop"` at least that).

    Raises:
        ValueError: if arguments or the loss have another form, or a trainable parameter has no rule (`mode="leaf"`).

    Example:
        >>> import torch
        >>> from hfnoise.privacy import per_unit_gradients
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> batch = {"x": torch.tensor([[1.0], [2.0]])}
        >>> per_unit_gradients(model, batch, lambda model, batch: model(batch["x"]).sum(1))["weight"].flatten()
        tensor([1., 2.])
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}.")
    rows = _rows(batch)
    if unit is None:
        unit = torch.arange(rows)
    if unit.dim() != 1 or unit.dtype != torch.int64 or not unit.numel() or int(unit.min()) < 0:
        raise ValueError(
            f"unit must be int64 of shape (rows,), from 0 on; got {unit.dtype} of shape {tuple(unit.shape)}."
        )
    units = int(unit.max()) + 1
    if rows not in (len(unit), units):
        raise ValueError(
            f"the batch's first tensor has {rows} rows, but unit names {len(unit)} rows of {units} units. The tensors "
            "of the batch need one row per entry of unit, or one per unit."
        )
    if mode == "loop":
        return _loop(model, batch, loss_fn, unit, units, rows)
    with UnitGradientRecorder(model, units) as recorder:
        with recorder.record(unit, torch.ones(len(unit))), torch.enable_grad():
            loss = _check_loss(loss_fn(model, batch), units)
            loss.sum().backward()  # type: ignore[no-untyped-call]
        return recorder.collect()


def _loop(
    model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFunction, unit: Tensor, units: int, rows: int
) -> dict[str, Tensor]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError("the model has no trainable parameter: add an adapter, or unfreeze what shall train.")
    gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}
    before = [parameter.grad for parameter in parameters.values()]
    try:
        for number in range(units):
            chosen = (unit == number).nonzero().flatten() if rows == len(unit) else torch.tensor([number])
            if not len(chosen):
                raise ValueError(f"unit {number} has no row. Number the units from 0 on without gaps.")
            part = {key: value[chosen.to(value.device)] if _has_rows(value) else value for key, value in batch.items()}
            for parameter in parameters.values():
                parameter.grad = None
            # Not `torch.autograd.grad`: under reentrant checkpointing it finds no gradient, and says nothing.
            with torch.enable_grad():
                _check_loss(loss_fn(model, part), 1).sum().backward()  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items():
                gradients[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    finally:
        for parameter, gradient in zip(parameters.values(), before, strict=True):
            parameter.grad = gradient
    return {
        name: torch.stack(values).to(torch.promote_types(values[0].dtype, torch.float32))
        for name, values in gradients.items()
    }


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _rows(batch: Mapping[str, Any]) -> int:
    """Return the first dimension of the batch's tensors."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch must be a dict of tensors, got {type(batch).__name__}.")
    sizes = {key: len(value) for key, value in batch.items() if _has_rows(value)}
    if not sizes or len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(f"the batch's tensors must have the same number of rows, at least 1; got {sizes}.")
    return next(iter(sizes.values()))


def _check_loss(loss: Tensor, units: int) -> Tensor:
    if not isinstance(loss, Tensor) or loss.shape not in ((), (units,)):
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_fn must return the losses of the {units} units, shape ({units},), or their sum; got {shape}. If "
            "the model sees several rows per unit, name their units: unit=torch.arange(pairs).repeat(2)."
        )
    return loss
