"""Per-unit gradients of a model's trainable parameters, recorded in one ordinary backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor, nn

from hfnoise.privacy.expanded_leaf import RowsOfUnits, expanded_leaf
from hfnoise.privacy.gradient_rules import RecordedForward, rule_for

_SHOWN = 20  # names in a message; a large model has thousands


class UncoveredParametersError(ValueError):
    """Trainable parameters without a rule for per-unit gradients.

    Args:
        uncovered (`dict[str, str]`): what is wrong with each, by the parameter's name.
    """

    def __init__(self, uncovered: dict[str, str]) -> None:
        self.uncovered = uncovered
        lines = [f"  {name}: {reason}" for name, reason in list(uncovered.items())[:_SHOWN]]
        if len(uncovered) > _SHOWN:
            lines.append(f"  and {len(uncovered) - _SHOWN} more")
        super().__init__(
            f"per-unit gradients of {len(uncovered)} trainable parameters are not known, so their part in a unit's "
            "influence could not be clipped and no (epsilon, delta) would hold:\n"
            + "\n".join(lines)
            + '\nUse grad_mode="loop" (one unit at a time, any layer), or freeze them (requires_grad_(False)).'
        )


class UnitGradientRecorder:
    """Records the gradient of every unit for every trainable parameter, while a model runs as it always does.

    Layers get their trainable weights as leaves expanded to one copy per unit
    ([`~hfnoise.privacy.expanded_leaf`]); what backward leaves in them are the per-unit gradients. It is one backward
    pass, without hooks. Two forwards in one recording, modules or parameters used twice, and both modes of
    gradient checkpointing sum into the same leaf, before any norm is taken. The parameters themselves get no gradient.

    Covered: `torch.nn.Linear` (the matrices of LoRA, rsLoRA and DoRA, `lora_bias`, heads in `modules_to_save`, also on
    4- and 8-bit bases), DoRA's magnitudes, `torch.nn.LayerNorm`, `torch.nn.RMSNorm` and the root-mean-square norms of
    transformers. Not covered: embeddings (`lora_embedding_B`), convolutions, and any other class.

    Formal guarantee: none by itself. If rows of different units do not influence each other's loss (the loss is
    separable) and the first dimension of every covered layer's input is the row, then what `collect` returns for a
    unit is the gradient of its loss alone, and its norm bounds what the unit adds to the sum.

    Args:
        model (`torch.nn.Module`): the model. The instances of its covered layers get another `forward`, which is the
            stock one outside of `record`; classes, `state_dict`, copies and pickles stay as they are.
        units (`int`): number of units in a micro-batch, at least 1, the same in each. Rows may vary.

    Raises:
        UncoveredParametersError: if a trainable parameter belongs to a layer without a rule.
        ValueError: if a trainable parameter is not float32, none is trainable, `units` is below 1, or another recorder
            is installed.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.gradient_recorder import UnitGradientRecorder
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> with UnitGradientRecorder(model, units=3) as recorder:
        ...     with recorder.record(torch.arange(3), torch.ones(3)):
        ...         model(torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
        ...     recorder.collect()["weight"].flatten().tolist()
        [1.0, 2.0, 3.0]
    """

    def __init__(self, model: nn.Module, units: int) -> None:
        if isinstance(units, bool) or not isinstance(units, int) or units < 1:
            raise ValueError(
                f"units is the number of units in a micro-batch, an integer of at least 1, got {units!r}."
            )
        self.model, self.units = model, units
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        _check_parameters(self.parameters)
        # For each parameter the forwards that use it, and under which name.
        self._uses: dict[str, list[tuple[RecordedForward, str]]] = {name: [] for name in self.parameters}
        self._forwards = self._find_rules()
        self._leaves: dict[str, Tensor] = {}
        self._gradients_before: dict[str, tuple[int, int] | None] = {}
        self._recording = self._checked = False
        for forward in self._forwards:
            setattr(forward.module, _attribute(forward.module), forward)

    def _find_rules(self) -> list[RecordedForward]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        forwards, uncovered = [], {}
        for module_name, module in self.model.named_modules():
            own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) in names}
            if not own:
                continue
            stock = getattr(module, _attribute(module))
            if isinstance(stock, RecordedForward):
                raise ValueError(
                    f"a UnitGradientRecorder is already installed on this model (at {module_name or 'its root'}). "
                    "Close it first: recorder.close()."
                )
            rule = rule_for(module, module_name or type(module).__name__, stock)
            if rule is None:
                reason = _reason(module, stock)
                uncovered.update({names[id(p)]: f"{key} of {reason}" for key, p in own.items()})
                continue
            forwards.append(rule)
            for key, parameter in own.items():
                self._uses[names[id(parameter)]].append((rule, key))
        if uncovered:
            raise UncoveredParametersError(uncovered)
        return forwards

    @contextmanager
    def record(self, unit: Tensor, row_weight: Tensor) -> Iterator[None]:
        """Record what runs inside, forward and backward: under checkpointing, backward runs the forward again.

        Args:
            unit (`torch.Tensor` of shape `(rows,)`, int64): to which unit each row belongs, in [0, units). A unit
                may have no row: its gradient is 0.
            row_weight (`torch.Tensor` of shape `(rows,)`, float32, finite): factor of the row's part in the gradient
                of its unit, and in nothing else: what flows on to earlier layers stays. 0 gives exactly 0, even for
                a row of NaN.

        Raises:
            ValueError: if shapes, dtypes or ranges are others, or the trainable parameters have changed.
            RuntimeError: if a recording is already under way.
        """
        if self._recording:
            raise RuntimeError("a recording is already under way: leave the first `record` before entering another.")
        row_is_unit = self._check_rows(unit, row_weight)
        self._renew_leaves()
        on_device: dict[torch.device, RowsOfUnits] = {}
        for name, uses in self._uses.items():
            device = self.parameters[name].device
            if device not in on_device:
                on_device[device] = RowsOfUnits(unit.to(device), row_weight.to(device), self.units, row_is_unit)
            for forward, _ in uses:
                forward.rows = on_device[device]
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
            for forward in self._forwards:
                forward.rows = None

    def _check_rows(self, unit: Tensor, row_weight: Tensor) -> bool:
        """Refuse what would charge gradients to the wrong unit; return whether row i is unit i."""
        if unit.dim() != 1 or unit.dtype != torch.int64 or unit.numel() == 0:
            raise ValueError(f"unit must be int64 of shape (rows,), got {unit.dtype} of shape {tuple(unit.shape)}.")
        if row_weight.shape != unit.shape or row_weight.dtype != torch.float32:
            raise ValueError(
                f"row_weight must be float32 of shape {tuple(unit.shape)}, as unit has; got {row_weight.dtype} of "
                f"shape {tuple(row_weight.shape)}."
            )
        numbers = unit.tolist()
        if min(numbers) < 0 or max(numbers) >= self.units:
            raise ValueError(
                f"unit must be in [0, {self.units}), got {min(numbers)} to {max(numbers)}. The number of units is "
                "fixed when the recorder is made."
            )
        if not bool(row_weight.isfinite().all()):
            raise ValueError(
                f"row_weight must be finite, got {row_weight.tolist()}. Give 0 to a row that must not count."
            )
        return numbers == list(range(self.units))

    def _renew_leaves(self) -> None:
        """Make the leaves again whose parameter has moved, and remember the gradients that parameters have."""
        trainable = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        if trainable != {id(parameter) for parameter in self.parameters.values()}:
            raise ValueError(
                "the trainable parameters are not those that the recorder was made for: some were frozen, unfrozen or "
                "replaced since. What is not recorded is not clipped. Close this recorder and make a new one."
            )
        for name, parameter in self.parameters.items():
            leaf = self._leaves.get(name)
            if leaf is None or leaf.data_ptr() != parameter.data_ptr() or leaf.device != parameter.device:
                leaf = self._leaves[name] = expanded_leaf(parameter, self.units)
                for forward, key in self._uses[name]:
                    forward.leaves[key] = leaf
        # Two recordings before one `collect` are one: what happened in the first must still be seen.
        if all(leaf.grad is None for leaf in self._leaves.values()):
            self._gradients_before = {name: _gradient_state(p) for name, p in self.parameters.items()}

    def collect(self) -> dict[str, Tensor]:
        """Return the gradients recorded since the last `reset`; call it after backward.

        The first call refuses a parameter that took no part, as the wiring is probably wrong. Later calls return zeros
        for it: a layer may rest in a micro-batch (layer dropout, a batch without images), and zero is then its
        gradient. A layer that is bypassed, its weight used by others, is refused in every call.

        Returns:
            `dict[str, torch.Tensor]`: for each name in `parameters` the gradients, `(units, *parameter.shape)` in
            float32. They are the recorder's own until `reset`.

        Raises:
            RuntimeError: if a parameter took no part in the first recording, or got an ordinary gradient.
        """
        ordinary = [
            name
            for name, parameter in self.parameters.items()
            if parameter.grad is not None and _gradient_state(parameter) != self._gradients_before.get(name)
        ]
        if ordinary:
            raise RuntimeError(
                f"{_names(ordinary)} got an ordinary gradient while per-unit gradients were recorded: something uses "
                "the parameter without calling its module (a LoRA variant that reads lora_B.weight), or ran outside "
                "of `record` (backward belongs inside). That part is in no unit's gradient, so training would "
                'silently be wrong. Use grad_mode="loop", or freeze the parameter.'
            )
        idle = [name for name in self.parameters if name not in self._leaves or self._leaves[name].grad is None]
        if idle and not self._checked:
            raise RuntimeError(
                f"{_names(idle)} got no gradient in the first recording: the module was not called (an adapter that "
                "is switched off or bypassed), or no gradient flows to it (reentrant checkpointing needs "
                "model.enable_input_require_grads()). Freeze what is not meant to train."
            )
        self._checked = True
        return {name: self._gradient(name) for name in self.parameters}

    def _gradient(self, name: str) -> Tensor:
        parameter, leaf = self.parameters[name], self._leaves[name]
        return parameter.new_zeros(self.units, *parameter.shape) if leaf.grad is None else leaf.grad

    def reset(self) -> None:
        """Forget the gradients, and free them unless the caller keeps what `collect` returned."""
        for leaf in self._leaves.values():
            leaf.grad = None

    def close(self) -> None:
        """Give every module its own forward back, and forget all gradients; once is enough, more do no harm."""
        for forward in self._forwards:
            attribute = _attribute(forward.module)
            if forward.module.__dict__.get(attribute) is forward:
                if attribute == "forward":
                    delattr(forward.module, attribute)
                else:
                    setattr(forward.module, attribute, forward.stock)
        self._forwards = []
        self._uses, self._leaves = {name: [] for name in self.parameters}, {}

    def __enter__(self) -> UnitGradientRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _attribute(module: nn.Module) -> str:
    """Return where the forward lies: accelerate's hooks keep it as `_old_forward`, and align devices around it."""
    return "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__ else "forward"


def _check_parameters(parameters: dict[str, nn.Parameter]) -> None:
    if not parameters:
        raise ValueError("the model has no trainable parameter: add an adapter, or unfreeze what shall train.")
    offloaded = [name for name, p in parameters.items() if p.is_meta]
    if offloaded:
        raise ValueError(
            f"{_names(offloaded)} are offloaded (device meta). Keep what trains on a device: name it in device_map, "
            "and offload frozen layers only."
        )
    others = {name: p.dtype for name, p in parameters.items() if p.dtype != torch.float32}
    if others:
        raise ValueError(
            f"trainable parameters must be float32, got {dict(list(others.items())[:_SHOWN])}. Gradients of units and "
            "the noise added to them are float32: in 16 bits the noise would take a few thousand values only, and "
            "scaling for fp16 changes the clipping norm. Load the adapter with autocast_adapter_dtype=True "
            "(PEFT's default), or convert: parameter.data = parameter.data.float()."
        )


def _reason(module: nn.Module, stock: object) -> str:
    kind = type(module).__name__
    if getattr(stock, "__func__", None) is not type(module).forward:
        return f"a {kind} whose forward was replaced on the instance"
    return kind


def _gradient_state(parameter: nn.Parameter) -> tuple[int, int] | None:
    """Return what changes when autograd adds to the parameter's gradient."""
    return None if parameter.grad is None else (id(parameter.grad), parameter.grad._version)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
