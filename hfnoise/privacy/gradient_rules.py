"""For which layers per-unit gradients are known, and their forwards with expanded leaves."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from hfnoise.privacy.expanded_leaf import CopyOfEachRow, ExpandedLayerNorm, ExpandedLinear, RowsOfUnits


class RecordedForward(ABC):
    """The forward of a module while gradients are recorded; the stock one whenever they are not.

    It is put on the instance in the place of `forward` (or of `_old_forward`, see
    [`~hfnoise.privacy.gradient_recorder.UnitGradientRecorder`]). A copy or a pickle of the module gets the stock
    forward.

    Args:
        module (`torch.nn.Module`): the module.
        name (`str`): of the module in the model, for messages.
        stock (callable): the forward that it had.
    """

    def __init__(self, module: nn.Module, name: str, stock: Any) -> None:
        self.module, self.name, self.stock = module, name, stock
        self.leaves: dict[str, Tensor] = {}
        self.rows: RowsOfUnits | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without gradients nothing is to be recorded: reference passes, the first pass of reentrant checkpointing.
        if self.rows is None or not torch.is_grad_enabled():
            return self.stock(*args, **kwargs)
        return self.record(self.rows, *args, **kwargs)

    @abstractmethod
    def record(self, rows: RowsOfUnits, *args: Any, **kwargs: Any) -> Any:
        """Compute the forward with expanded leaves; a class for each kind of module does."""

    def value(self, name: str) -> Any:
        """Return a parameter's value without its gradient, or None."""
        parameter = getattr(self.module, name)
        return None if parameter is None else parameter.detach()

    def __reduce__(self) -> Any:
        # Resolved while the copy has no attributes of its own yet, so this is the forward of its class.
        return getattr, (self.module, "forward")


class RecordedLinear(RecordedForward):
    """`torch.nn.Linear`."""

    def record(self, rows: RowsOfUnits, *args: Any, **kwargs: Any) -> Any:
        (inputs,) = (*args, *kwargs.values())
        return ExpandedLinear.apply(  # type: ignore[no-untyped-call]
            inputs, self.value("weight"), self.value("bias"), self.leaves.get("weight"), self.leaves.get("bias"),
            rows, self.name,
        )  # fmt: skip


class RecordedLayerNorm(RecordedForward):
    """`torch.nn.LayerNorm`."""

    def record(self, rows: RowsOfUnits, *args: Any, **kwargs: Any) -> Any:
        (inputs,) = (*args, *kwargs.values())
        return ExpandedLayerNorm.apply(  # type: ignore[no-untyped-call]
            inputs, self.value("weight"), self.value("bias"), self.leaves.get("weight"), self.leaves.get("bias"),
            self.module.eps, rows, self.name,
        )  # fmt: skip


class _WithWeight:
    """A module with something else as its weight, for the forward of its class."""

    def __init__(self, module: nn.Module, weight: Any) -> None:
        self._module, self.weight = module, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def copies_of_rows(leaf: Tensor, inputs: Tensor, rows: RowsOfUnits, layer: str) -> Tensor:
    """Return one copy of a leaf's values per row, `(rows, 1, ..., *its own)`, to be multiplied to the inputs."""
    if inputs.shape[0] != rows.unit.shape[0]:
        raise ValueError(
            f"the input of {layer} has shape {tuple(inputs.shape)}, but the micro-batch has "
            f"{rows.unit.shape[0]} rows: gradients would be charged to the wrong units and clipping would bound no "
            'unit\'s influence. Freeze the layer, or use grad_mode="loop".'
        )
    copies: Tensor = CopyOfEachRow.apply(leaf, rows)  # type: ignore[no-untyped-call]
    return copies.reshape(copies.shape[0], *[1] * (inputs.dim() - leaf.dim()), *leaf.shape[1:])


class RecordedElementwise(RecordedForward):
    """Root-mean-square norms, `torch.nn`'s and those of transformers: the weight is multiplied to the last dimensions.

    The forward of the class runs with one copy of the weight per row, so `w * x` and Gemma's `(1 + w) * x` need no
    rule of their own.
    """

    def record(self, rows: RowsOfUnits, *args: Any, **kwargs: Any) -> Any:
        inputs = args[0] if args else next(iter(kwargs.values()))
        copies = copies_of_rows(self.leaves["weight"], inputs, rows, self.name)
        return self.forward_with(copies, *args, **kwargs)

    def forward_with(self, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output with this weight, of shape `(rows, 1, ..., *weight's own)`."""
        if isinstance(self.module, nn.RMSNorm):
            inputs, shape, epsilon = args[0], self.module.normalized_shape, self.module.eps
            # What type the stock norm returns depends on the device and on autocast, so it is asked, with no rows.
            dtype = self.stock(inputs[:0]).dtype
            return (nn.functional.rms_norm(inputs.float(), shape, None, epsilon) * weight).to(dtype)
        return type(self.module).forward(_WithWeight(self.module, weight), *args, **kwargs)

    def works(self) -> bool:
        """Return whether the class really multiplies elementwise: output and gradient agree with the stock forward."""
        weight = self.module.get_parameter("weight")
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(2, 3, *weight.shape, generator=generator).to(weight.device)
        factors = torch.randn(2, 3, *weight.shape, generator=generator).to(weight.device)
        copies = weight.detach().expand(2, 1, *weight.shape).clone().requires_grad_()
        try:
            with torch.enable_grad():
                stock, ours = self.stock(inputs), self.forward_with(copies, inputs)
                (expected,) = torch.autograd.grad((stock * factors).sum(), weight)
                (found,) = torch.autograd.grad((ours * factors).sum(), copies)
        except Exception:  # of a class that we do not know: whatever it is, the rule does not fit
            return False
        return torch.allclose(stock, ours, atol=1e-5) and torch.allclose(expected, found.sum((0, 1)), atol=1e-4)


class _MagnitudeOfRows:
    """DoRA's magnitude with one copy per row: knows the two operations of PEFT's formula, and fails at any other."""

    def __init__(self, copies: Tensor) -> None:
        self.copies = copies

    def __truediv__(self, norms: Tensor) -> _MagnitudeOfRows:
        return _MagnitudeOfRows(self.copies / norms)

    def view(self, first: int, second: int) -> Tensor:
        """Return the copies where PEFT makes its vector broadcast over rows and positions."""
        if (first, second) != (1, -1):
            raise ValueError(f"PEFT views DoRA's magnitude as (1, -1), got ({first}, {second}): another formula.")
        return self.copies


class RecordedDora(RecordedForward):
    """PEFT's `DoraLinearLayer`: its magnitude m scales the columns, (m / norm) * (W x + s B A x), norm a constant."""

    def record(self, rows: RowsOfUnits, *args: Any, **kwargs: Any) -> Any:
        inputs = args[0] if args else kwargs["x"]
        magnitude = _MagnitudeOfRows(copies_of_rows(self.leaves["weight"], inputs, rows, self.name))
        return type(self.module).forward(_WithWeight(self.module, magnitude), *args, **kwargs)


def rule_for(module: nn.Module, name: str, stock: Any) -> RecordedForward | None:
    """Return the recorded forward of a module, or None if there is no rule for its class.

    Args:
        module (`torch.nn.Module`): a module with parameters of its own.
        name (`str`): of the module in the model, for messages.
        stock (callable): its forward.
    """
    forward = type(module).forward
    if getattr(stock, "__func__", None) is not forward:
        return None  # somebody replaced it on the instance: what it computes is not known
    if forward is nn.Linear.forward:
        return RecordedLinear(module, name, stock)
    if forward is nn.LayerNorm.forward:
        return RecordedLayerNorm(module, name, stock)
    own = [key for key, parameter in module.named_parameters(recurse=False) if parameter is not None]
    if own == ["weight"] and type(module).__name__ == "DoraLinearLayer":
        return RecordedDora(module, name, stock)
    if own == ["weight"] and re.search("(RMS|Layer)Norm$", type(module).__name__):
        rule = RecordedElementwise(module, name, stock)
        return rule if rule.works() else None
    return None
