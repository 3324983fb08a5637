"""Linear layers of a model swapped for quantised ones: nn.Linear, and the transposed Conv1D of GPT-2."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfnoise.quantization.hf_config import QuestConfig
from hfnoise.quantization.linear import LinearQuantization, QuestLinear, describe, prepare_layer, quantized_forward
from hfnoise.quantization.packed_linear import QuestPackedLinear

# Of Mamba and its kin, whose mixers multiply by `dt_proj.weight`: quantised in no forward, and of no use when packed.
_READ_NOT_CALLED = ("dt_proj",)


class QuestConv1D(Conv1D):  # type: ignore[misc]
    """GPT-2's transposed linear layer (weight of shape `(in, out)`), quantised as a [`QuestLinear`] is.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import LinearQuantization
        >>> from hfnoise.quantization.hf_layers import QuestConv1D
        >>> QuestConv1D(8, 64, LinearQuantization(2, 2))(torch.ones(3, 64)).shape
        torch.Size([3, 8])
    """

    transposed = True

    def __init__(self, nf: int, nx: int, quantization: LinearQuantization) -> None:
        super().__init__(nf, nx)
        prepare_layer(self, quantization)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return quantized_forward(self, x, self.weight.t())

    def __repr__(self) -> str:
        return f"QuestConv1D(nf={self.nf}, nx={self.nx}, {describe(self.quantization)})"


def linear_quantization(config: QuestConfig) -> LinearQuantization:
    """Return the part of a configuration that a layer reads.

    Example:
        >>> from hfnoise import QuestConfig
        >>> from hfnoise.quantization.hf_layers import linear_quantization
        >>> linear_quantization(QuestConfig(bits=2)).weight_bits
        2
    """
    return LinearQuantization(
        config.weight_bits, config.activation_bits, config.estimator, config.hadamard_group, config.grid,
        config.trust_factor,
    )  # fmt: skip


def layers_to_convert(
    model: nn.Module, config: QuestConfig, stored: bool = False
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers of a model that are quantised, by name, and those that are not, with the reason.

    Left as they are: output embeddings and whatever is tied to them, the last layer, heads outside of the base model
    and what `modules_to_not_convert` names.

    Args:
        model (`torch.nn.Module`): of transformers, diffusers or your own.
        config ([`hfnoise.QuestConfig`]).
        stored (`bool`, defaults to `False`): the configuration is that of a checkpoint, perhaps of a model with
            another head: names of `modules_to_not_convert` may match nothing, and those of the base model have its
            prefix.

    Raises:
        ValueError: if a name in `modules_to_not_convert` matches no linear layer, or nothing is left to quantise.

    Example:
        >>> from torch import nn
        >>> from hfnoise import QuestConfig
        >>> from hfnoise.quantization.hf_layers import layers_to_convert
        >>> model = nn.ModuleDict({"attention": nn.Linear(8, 8), "router": nn.Linear(8, 2)})
        >>> list(layers_to_convert(model, QuestConfig(bits=2, modules_to_not_convert=["router"]))[0])
        ['attention']
    """
    # Not at the top: it sets off the hook that imports hf_transformers, which imports this module.
    from transformers.quantizers.quantizers_utils import should_convert_module

    linear = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    kept = _kept(model)
    wanted = config.modules_to_not_convert or []
    unmatched = [one for one in wanted if all(should_convert_module(name, [one]) for name, _ in model.named_modules())]
    prefix = getattr(model, "base_model_prefix", "")
    if stored and prefix and not hasattr(model, prefix):  # the base model alone
        wanted = [*wanted, *(one.removeprefix(f"{prefix}.") for one in wanted)]
    if unmatched and not stored:
        offered = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ValueError(
            f"modules_to_not_convert names {', '.join(map(repr, unmatched))}, which matches no module of "
            f"{type(model).__name__}. Its linear layers: {offered}."
        )
    chosen, skipped = {}, {}
    for name, module in linear.items():
        if not should_convert_module(name, wanted or None):
            skipped[name] = "in modules_to_not_convert"
        elif name in kept:
            skipped[name] = kept[name]
        else:
            chosen[name] = module
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantise"
            + (f"; left out: {', '.join(f'{name} ({why})' for name, why in skipped.items())}." if skipped else ".")
        )
    return chosen, skipped


def _kept(model: nn.Module) -> dict[str, str]:
    """Return the modules that stay, with the reason."""
    # Beside the precision that the model's authors ask for: T5 casts an input to the dtype of such a weight, and that
    # of a packed one is uint8.
    float32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept = {
        name: "kept in float32 by the model"
        for name, _ in model.named_modules()
        if float32.intersection(name.split("."))
    }
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] in _READ_NOT_CALLED:
            kept.setdefault(name, "its weight is read, not called, by the model")
    if not hasattr(model, "get_output_embeddings"):  # of diffusers, or the user's own
        return kept
    from transformers.quantizers.base import get_keys_to_not_convert

    for name in get_keys_to_not_convert(model):
        kept.setdefault(name.removesuffix(".bias"), "output embedding, tied to one, or the last layer")
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        for name, _ in model.named_modules():
            if name and name != prefix and not name.startswith(f"{prefix}."):
                kept.setdefault(name, f"outside of the base model {prefix!r}")
    return kept


def quantize_layers(model: nn.Module, config: QuestConfig, packed: bool, stored: bool = False) -> nn.Module:
    """Swap the linear layers of `model` in place, re-using their Parameter objects; return the model.

    Args:
        model (`torch.nn.Module`): its weights may be on the meta device.
        config ([`hfnoise.QuestConfig`]).
        packed (`bool`): make packed layers, whose weights are then loaded; otherwise layers with master weights.
        stored (`bool`, defaults to `False`): see [`layers_to_convert`].

    Raises:
        ValueError: as [`layers_to_convert`].

    Example:
        >>> from torch import nn
        >>> from hfnoise import QuestConfig
        >>> from hfnoise.quantization.hf_layers import quantize_layers
        >>> quantize_layers(nn.Sequential(nn.Linear(8, 8)), QuestConfig(bits=1), packed=False)
        Sequential(
          (0): QuestLinear(in_features=8, out_features=8, bias=True, weight_bits=1, activation_bits=1, estimator=quest)
        )
    """
    chosen, skipped = layers_to_convert(model, config, stored)
    _warn_of_experts(model)
    quantization = linear_quantization(config)
    swapped = {}
    for name, module in chosen.items():
        made = packed_layer(module, quantization) if packed else master_layer(module, quantization)
        swapped[name] = made.train(module.training)
    swap_layers(model, swapped)
    model.quest_skipped = skipped  # type: ignore[assignment]
    return model


def swap_layers(model: nn.Module, made: Mapping[str, nn.Module]) -> None:
    """Put layers in the place of those of the same names, and of the other names that a shared layer has.

    Example:
        >>> from torch import nn
        >>> from hfnoise.quantization.hf_layers import swap_layers
        >>> model = nn.Sequential(nn.ReLU(), nn.ReLU())
        >>> swap_layers(model, {"0": nn.GELU()})
        >>> model
        Sequential(
          (0): GELU(approximate='none')
          (1): ReLU()
        )
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    places = {name: names[id(model.get_submodule(name))] for name in made}
    for name, layer in made.items():
        for place in places[name]:
            model.set_submodule(place, layer)


def _warn_of_experts(model: nn.Module) -> None:
    """Warn of weights that are most of such a model and stay floats; Python shows a text once."""
    stacked = [
        (f"{name}.{own}", parameter.numel())
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.modules.conv._ConvNd)
    ]
    if stacked:
        share = sum(count for _, count in stacked) / max(1, sum(p.numel() for p in model.parameters()))
        warnings.warn(
            f"{type(model).__name__} keeps {len(stacked)} weights of stacked experts as floats ({stacked[0][0]}, ...)"
            f", {share:.0%} of its entries: they are no linear layers. hfnoise.quantization_report(model) lists them.",
            stacklevel=4,
        )


def master_layer(module: nn.Module, quantization: LinearQuantization) -> nn.Module:
    """Return a layer with the Parameter objects of `module`, quantised in every forward.

    Example:
        >>> from torch import nn
        >>> from hfnoise.quantization import LinearQuantization
        >>> from hfnoise.quantization.hf_layers import master_layer
        >>> layer = nn.Linear(8, 8)
        >>> master_layer(layer, LinearQuantization(1, 1)).weight is layer.weight
        True
    """
    made: Any
    if isinstance(module, Conv1D):
        made = QuestConv1D.__new__(QuestConv1D)
        nn.Module.__init__(made)
        made.nf, made.nx = module.nf, module.nx
    else:
        made = QuestLinear.__new__(QuestLinear)
        nn.Module.__init__(made)
        made.in_features, made.out_features = module.in_features, module.out_features
    made.weight, made.bias = module.weight, module.bias
    prepare_layer(made, quantization)
    return made  # type: ignore[no-any-return]


def packed_layer(module: Any, quantization: LinearQuantization) -> QuestPackedLinear:
    """Return an empty packed layer for `module`, with its bias.

    Example:
        >>> from torch import nn
        >>> from hfnoise.quantization import LinearQuantization
        >>> from hfnoise.quantization.hf_layers import packed_layer
        >>> packed_layer(nn.Linear(64, 8), LinearQuantization(1, 1)).weight.shape
        torch.Size([1, 8, 8])
    """
    transposed = isinstance(module, Conv1D)
    rows, length = (module.nf, module.nx) if transposed else (module.out_features, module.in_features)
    made = QuestPackedLinear(
        length,
        rows,
        False,
        module.weight.device,
        None,
        quantization,
        transposed=transposed,
    )
    made.bias = module.bias
    return made


def stock_layer(module: Any, weight: Tensor) -> nn.Module:
    """Return a stock layer (nn.Linear or Conv1D) in the place of a quantised one, with the given `(out, in)` weight.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import LinearQuantization, QuestLinear
        >>> from hfnoise.quantization.hf_layers import stock_layer
        >>> stock_layer(QuestLinear(4, 2), torch.ones(2, 4))
        Linear(in_features=4, out_features=2, bias=True)
    """
    made: Any
    bias: nn.Parameter | None = module.bias
    if getattr(module, "transposed", False):
        made = Conv1D.__new__(Conv1D)
        nn.Module.__init__(made)
        made.nf, made.nx = weight.shape
        weight = weight.t()
    else:
        made = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(made)
        made.out_features, made.in_features = weight.shape
    made.weight, made.bias = nn.Parameter(weight.contiguous()), bias
    return made  # type: ignore[no-any-return]
