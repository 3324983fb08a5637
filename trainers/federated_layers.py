"""The LoRA layers of a PEFT model as a federation sees them: names, factors, scalings, and the frozen weight below."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfnoise.privacy.lora_factors import LoraFactors

_CACHE = "_hfnoise_lora_layers"
# How bitsandbytes, GPTQ, AWQ and the like say what they have done, on the layer or its weight; where it is stored, and
# in what it computes, may differ between clients.
_QUANTIZATION = ("quant_type", "blocksize", "compress_statistics", "bits", "w_bit", "group_size")
# Of classifiers, as PEFT knows them.
_HEADS = ("classifier", "score")
# PEFT subtracts the first B A from the base weights, or quantises them.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraLayer:
    """One adapted layer.

    Args:
        name (`str`): its path in the base model.
        module: PEFT's layer.
        adapter (`str`): name of the adapter.
    """

    name: str
    module: Any
    adapter: str

    @property
    def lora_A(self) -> nn.Parameter:
        """Parameter of shape `(rank, inputs)`."""
        weight: nn.Parameter = self.module.lora_A[self.adapter].weight
        return weight

    @property
    def lora_B(self) -> nn.Parameter:
        """Parameter of shape `(outputs, rank)`."""
        weight: nn.Parameter = self.module.lora_B[self.adapter].weight
        return weight

    @property
    def scaling(self) -> float:
        """Alpha / r (rsLoRA: alpha / sqrt(r)), by which the layer multiplies B A."""
        return float(self.module.scaling[self.adapter])

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def kind(self) -> str:
        """What the frozen weight is: class of the layer below, and how it is quantised, as far as that says so."""
        base = self.module.get_base_layer()
        weight = getattr(base, "weight", None)
        holders = (base, weight)
        found = {name: getattr(one, name) for name in _QUANTIZATION for one in holders if hasattr(one, name)}
        details = [f"{name}={value}" for name, value in found.items() if isinstance(value, (bool, int, str))]
        return " ".join([type(base).__name__, *(details if self.is_quantized else [])])

    @property
    def is_quantized(self) -> bool:
        """Whether the frozen weight is no plain floating matrix."""
        base = self.module.get_base_layer()
        plain = (
            type(base) in (nn.Linear, Conv1D) and type(base.weight.data) is Tensor
        )  # torchao has tensors of its own
        return not plain or base.weight.dtype.itemsize < 2 or not base.weight.is_floating_point()


class LoraLayers:
    """The layers of a model, and the frozen weights as they were before anything was folded into them.

    Args:
        model: a PEFT model with one plain LoRA adapter.

    Raises:
        ValueError: if there is none, or the adapter has parts that are not the two factors.
    """

    def __init__(self, model: Any) -> None:
        self._layers = {layer.name: layer for layer in _find(model)}
        self._frozen: dict[str, Tensor] = {}

    @classmethod
    def of(cls, model: Any) -> LoraLayers:
        """Return the layers of a model, always the same object: clients may share a model."""
        found = getattr(model, "__dict__", {}).get(_CACHE)  # its own: PEFT passes other names on to the base model
        if found is None:
            found = cls(model)
            object.__setattr__(model, _CACHE, found)
        return found

    def __iter__(self) -> Any:
        return iter(self._layers.values())

    def __getitem__(self, name: str) -> LoraLayer:
        return self._layers[name]

    @property
    def names(self) -> list[str]:
        """Paths of the layers, in the order of the model."""
        return list(self._layers)

    @property
    def scalings(self) -> dict[str, float]:
        """Alpha / r of every layer."""
        return {layer.name: layer.scaling for layer in self}

    def fingerprint(self) -> str:
        """Return a hash of what all clients must share: names, shapes and kinds of the layers; not the ranks."""
        text = "\n".join(f"{layer.name} {layer.shape} {layer.kind}" for layer in self)
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> dict[str, tuple[tuple[int, int], str]]:
        """Return shape and kind of every layer, which `fingerprint` is a hash of."""
        return {layer.name: (layer.shape, layer.kind) for layer in self}

    def read(self) -> dict[str, LoraFactors]:
        """Return copies of all factors, float32, on the CPU."""
        return {layer.name: LoraFactors(_plain(layer.lora_A), _plain(layer.lora_B)) for layer in self}

    def write(self, factors: Mapping[str, LoraFactors | tuple[Tensor, Tensor]]) -> None:
        """Put factors into the model.

        Raises:
            ValueError: for factors of other layers or shapes; nothing is written then.
        """
        if set(factors) != set(self._layers):
            raise ValueError(
                f"factors are of the layers {sorted(factors)[:3]}, and the adapter has {self.names[:3]}. Give all "
                "clients the same target_modules."
            )
        for name, (lora_A, lora_B) in factors.items():
            for given, own in ((lora_A, self[name].lora_A), (lora_B, self[name].lora_B)):
                if given.shape != own.shape:
                    raise ValueError(f"layer {name!r} takes {tuple(own.shape)}, got {tuple(given.shape)}.")
        with torch.no_grad():
            for name, (lora_A, lora_B) in factors.items():
                self[name].lora_A.copy_(lora_A)
                self[name].lora_B.copy_(lora_B)

    def fold(self, changes: Mapping[str, Tensor]) -> None:
        """Set every frozen weight to what it was at first plus a change, `(outputs, inputs)`; {} takes all back.

        Raises:
            ValueError: for a quantised base, whose weights take no sums.
        """
        for name in changes:
            if self[name].is_quantized:
                raise ValueError(
                    f"layer {name!r} has a quantised base ({self[name].kind}): an update cannot be added to its "
                    "weights without rounding them anew, differently at every client. Use aggregation='fedsvd' or "
                    "'ffa' with subspace='fixed', or a base that is not quantised."
                )
        with torch.no_grad():
            for name in {*self._frozen, *changes}:
                base = self[name].module.get_base_layer()
                if name not in self._frozen:
                    self._frozen[name] = base.weight.detach().cpu().clone()
                value = self._frozen[name].double()
                if name in changes:
                    change = changes[name].detach().cpu().double()
                    value = value + (change.mT if isinstance(base, Conv1D) else change)
                base.weight.copy_(value)

    def base_weight(self, name: str) -> Tensor:
        """Return the frozen weight `(outputs, inputs)` as it was at first, on the CPU."""
        base = self[name].module.get_base_layer()
        weight = self._frozen.get(name, base.weight).detach().cpu()
        return weight.mT if isinstance(base, Conv1D) else weight


def freeze_lora_A(model: Any) -> Any:
    """Return the model with its LoRA factors A frozen, so that only B is trained; before a Trainer is built on it.

    Args:
        model: a PEFT model with a LoRA adapter; changed in place.

    Example:
        >>> from hfnoise import freeze_lora_A
        >>> freeze_lora_A("a string")
        Traceback (most recent call last):
        ...
        ValueError: a federation needs a PEFT model with a LoRA adapter, got str. Use peft.get_peft_model.
    """
    for layer in LoraLayers(model):
        layer.lora_A.requires_grad_(False)
    return model


def exported_parts(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return the adapter's configuration and the weights that it saves beside the factors: frozen heads.

    `modules_to_save` of the configuration are those that the model has: for classifiers PEFT lists names on trial. A
    classifier's frozen head is saved even if the configuration does not name it: drawn at random, as in
    arXiv 2505.12805, it is in no other file, and the adapter is worth nothing without it.

    Args:
        model: a PEFT model with one LoRA adapter.
    """
    adapter = model.active_adapters[0]
    config = copy.deepcopy(model.peft_config[adapter])
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    heads = {name: value.detach().cpu().clone() for name, value in saved.items() if ".lora_" not in name}
    base = model.get_base_model()
    if config.task_type is None:  # as PEFT's own save: without either, AutoPeftModelForCausalLM knows no class
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    if not config.modules_to_save and type(base).__name__.endswith("ForSequenceClassification"):
        for name in _HEADS:
            head = getattr(base, name, None)
            if isinstance(head, nn.Module) and not any(".lora_" in key for key in head.state_dict()):
                config.modules_to_save = [name]
                heads |= {
                    f"base_model.model.{name}.{key}": value.detach().cpu().clone()
                    for key, value in head.state_dict().items()
                }
    if config.modules_to_save:
        config.modules_to_save = [one for one in config.modules_to_save if any(one in name for name in heads)] or None
    return config, heads


def _plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32, copy=True)


def _find(model: Any) -> list[LoraLayer]:
    has_adapter = isinstance(model, nn.Module) and is_peft_model(model)
    if not has_adapter:
        raise ValueError(
            f"a federation needs a PEFT model with a LoRA adapter, got {type(model).__name__}. Use "
            "peft.get_peft_model."
        )
    adapters = model.active_adapters
    if len(adapters) != 1:
        raise ValueError(f"a federation needs one active adapter, got {list(adapters)}. Use model.set_adapter.")
    adapter, config = adapters[0], model.peft_config[adapters[0]]
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ValueError(f"a federation averages LoRA factors; the adapter is of the type {config.peft_type}.")
    if getattr(config, "use_dora", False):
        raise ValueError("use_dora=True: magnitudes are no part of B A and are not averaged. Use plain LoRA.")
    start = str(config.init_lora_weights).lower()
    if start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} has taken the first factors out of the base weights, and "
            "a federation starts from others: the model would have lost them. Use init_lora_weights=True, and for "
            "singular vectors of the base FedSVDConfig(init_lora_A='w0_svd')."
        )
    root = model.get_base_model()
    layers = [
        LoraLayer(name, module, adapter)
        for name, module in root.named_modules()
        if adapter in getattr(module, "lora_A", {}) and adapter in getattr(module, "lora_B", {})
    ]
    if not layers:
        raise ValueError(f"the adapter {adapter!r} has no linear layers: choose target_modules that are linear.")
    for layer in layers:
        if layer.lora_A.dim() != 2 or layer.lora_A.dtype != torch.float32:
            raise ValueError(
                f"layer {layer.name!r} has factors of {layer.lora_A.dim()} dimensions and {layer.lora_A.dtype}; a "
                "federation takes matrices in float32 (16 bits drift off the subspace)."
            )
    ours = {id(factor) for layer in layers for factor in (layer.lora_A, layer.lora_B)}
    others = [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in ours]
    if others:
        raise ValueError(
            f"{len(others)} trainable parameters are not LoRA factors ({others[0]}): they would stay different at "
            "every client. Freeze them, as the paper does with the classifier (no modules_to_save, bias='none')."
        )
    return layers
