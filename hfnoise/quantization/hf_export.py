"""From a float model to one that is trained quantised, to a packed one, and back to floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfnoise.quantization.hf_config import QuestConfig
from hfnoise.quantization.hf_layers import quantize_layers, stock_layer, swap_layers
from hfnoise.quantization.linear import LinearQuantization, describe, float_weight
from hfnoise.quantization.lsq import lsq_quantize
from hfnoise.quantization.packed_linear import QuestPackedLinear, pack_weight


def prepare_qat(model: Any, config: QuestConfig) -> Any:
    """Swap the linear layers of a model for quantised ones that share its weights, in place; return the model.

    What `from_pretrained(..., quantization_config=config)` does to a checkpoint, for a model that is built from a
    configuration, or in memory already. Parameter objects stay, so an optimizer that holds them goes on.

    Args:
        model (`torch.nn.Module`): of transformers, diffusers or your own, with float weights.
        config ([`hfnoise.QuestConfig`]): with `store_master_weights=True`.

    Returns:
        `torch.nn.Module`: the model; `model.config.quantization_config` is set, so `save_pretrained` writes it.

    Raises:
        ValueError: if `config` is for packed weights, the model is quantised already or has adapters, or nothing in
            it can be quantised.

    Example:
        >>> from torch import nn
        >>> from hfnoise import QuestConfig, prepare_qat
        >>> prepare_qat(nn.Sequential(nn.Linear(8, 8)), QuestConfig(bits=1))[0].quantization.weight_bits
        1
    """
    if not isinstance(config, QuestConfig):
        raise ValueError(f"config is {config!r}; give a QuestConfig.")
    if not config.store_master_weights:
        raise ValueError(
            "config has store_master_weights=False, which packs: call prepare_qat, train, then export_packed."
        )
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise ValueError(
            f"{type(model).__name__} has adapters, which would be quantised too: call prepare_qat before adding them."
        )
    done = [name for name, module in model.named_modules() if hasattr(module, "quantization")]
    if done:
        raise ValueError(f"{type(model).__name__} is quantised already: {done[0]} and {len(done) - 1} more layers.")
    quantize_layers(model, config, packed=False)
    set_quantization_config(model, config)
    return model


def export_packed(model: Any) -> Any:
    """Pack the master weights of a model in place, at their bits; return the model.

    It computes what it computed in training, to the last bit. `save_pretrained` and `push_to_hub` then write the
    packed form, which `from_pretrained` reads after `import hfnoise`; stock transformers refuses it.

    Args:
        model (`torch.nn.Module`): one with layers of a [`hfnoise.QuestConfig`].

    Returns:
        `torch.nn.Module`: the model, whose quantised weights take no gradient any more.

    Raises:
        ValueError: if there is nothing to pack, a weight is not finite (it is named), or the estimator is LSQ. The
            model is unchanged then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hfnoise import QuestConfig, export_packed, prepare_qat
        >>> model, x = prepare_qat(nn.Sequential(nn.Linear(64, 8)), QuestConfig(bits=1)), torch.randn(2, 64)
        >>> before = model(x)
        >>> torch.equal(before, export_packed(model)(x))
        True
    """
    masters = master_layers(model)
    kinds = {quantization for _, quantization in masters.values()}
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None and len(kinds) > 1:
        raise ValueError(
            f"the layers have {len(kinds)} settings ({', '.join(map(describe, kinds))}), and a checkpoint records "
            "one. Give all the same, or leave some out by modules_to_not_convert."
        )
    packed = {}
    for name, (module, quantization) in masters.items():
        weight = module.weight.t() if getattr(module, "transposed", False) else module.weight
        rows, length = weight.shape
        made = QuestPackedLinear(
            length, rows, False, "meta", None, quantization, transposed=getattr(module, "transposed", False)
        )
        try:
            made.weight, made.weight_scale = pack_weight(weight, quantization)
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from error
        made.bias = module.bias
        packed[name] = made.train(module.training)
    swap_layers(model, packed)
    if config is not None:
        # Of the layers, whose widths a schedule may have changed since the model was prepared.
        settings = {**_as_dict(config), **kinds.pop()._asdict(), "store_master_weights": False}
        config = QuestConfig(**settings)
        set_quantization_config(model, config)
        model.hf_quantizer = _quantizer_class(model)(config, pre_quantized=True)
        model.quantization_method = config.quant_method
        model.is_quantized = not _of_diffusers(model)  # which reads it to refuse casts; see hf_diffusers
    return model


def _of_diffusers(model: Any) -> bool:
    return hasattr(model, "_internal_dict")


def _quantizer_class(model: Any) -> Any:
    if _of_diffusers(model):
        from hfnoise.quantization.hf_diffusers import QuestDiffusersQuantizer

        return QuestDiffusersQuantizer
    from hfnoise.quantization.hf_transformers import QuestHfQuantizer

    return QuestHfQuantizer


def dequantize(model: Any, dtype: torch.dtype | None = None, weight_only: bool = False) -> Any:
    """Put stock layers with float weights in the place of quantised ones, in place; return the model.

    The weights are those of the grid, so with `activation_bits=None` the model computes what it computed before, to
    the last bit, and stock transformers loads it. With quantised activations it cannot: stock layers do not round
    them.

    Args:
        model (`torch.nn.Module`): with master or packed weights.
        dtype (`torch.dtype`, *optional*): of the weights; by default that of master weights, or of the model.
        weight_only (`bool`, defaults to `False`): accept that activations are not quantised any more.

    Returns:
        `torch.nn.Module`: the model, with no quantization configuration.

    Raises:
        ValueError: if nothing is quantised, or activations are and `weight_only` is not given. Nothing is changed
        then.

    Example:
        >>> from torch import nn
        >>> from hfnoise import QuestConfig, dequantize, prepare_qat
        >>> dequantize(prepare_qat(nn.Sequential(nn.Linear(64, 8)), QuestConfig(weight_bits=2)))
        Sequential(
          (0): Linear(in_features=64, out_features=8, bias=True)
        )
    """
    layers = quantized_layers(model)
    rounded = [name for name, (_, quantization) in layers.items() if quantization.activation_bits is not None]
    if rounded and not weight_only:
        raise ValueError(
            f"{len(rounded)} layers quantise their inputs ({rounded[0]}, ...), and stock layers do not: the float "
            "model would compute something else. Keep the packed form (export_packed), or accept that by "
            "weight_only=True."
        )
    default = getattr(model, "dtype", None)
    with torch.no_grad():
        for name, (module, quantization) in layers.items():
            # One by one: all weights twice are more than there may be room for.
            swap_layers(model, {name: stock_layer(module, dense_weight(module, quantization, dtype or default))})
    forget_quantizer(model)
    set_quantization_config(model, None)
    return model


def dense_weight(module: Any, quantization: LinearQuantization, dtype: torch.dtype | None) -> torch.Tensor:
    """Return the float weight, `(out, in)`, of a master or packed layer: on its grid, rotated back.

    Example:
        >>> from hfnoise.quantization import LinearQuantization, QuestLinear
        >>> from hfnoise.quantization.hf_export import dense_weight
        >>> dense_weight(QuestLinear(4, 2), LinearQuantization(), None).shape
        torch.Size([2, 4])
    """
    if isinstance(module, QuestPackedLinear):
        return module.float_weight(dtype)
    if quantization.estimator == "lsq":
        return lsq_quantize(module.weight, module.weight_step, quantization.weight_bits).to(
            dtype or module.weight.dtype
        )
    weight = module.weight.t() if getattr(module, "transposed", False) else module.weight
    return float_weight(module, weight).to(dtype or weight.dtype)


def quantized_layers(model: nn.Module) -> dict[str, tuple[Any, LinearQuantization]]:
    """Return the quantised layers of a model by name, master and packed; raise a ValueError if there are none.

    Example:
        >>> from torch import nn
        >>> from hfnoise.quantization import QuestLinear
        >>> from hfnoise.quantization.hf_export import quantized_layers
        >>> list(quantized_layers(nn.Sequential(QuestLinear(4, 2))))
        ['0']
    """
    found = {
        name: (module, module.quantization)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quantization", None), LinearQuantization)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no quantised layer; load it with a QuestConfig, or prepare_qat it."
        )
    return found


def master_layers(model: nn.Module) -> dict[str, tuple[Any, LinearQuantization]]:
    """Return the layers with master weights by name; raise a ValueError if there are none.

    Example:
        >>> from torch import nn
        >>> from hfnoise.quantization import QuestLinear
        >>> from hfnoise.quantization.hf_export import master_layers
        >>> list(master_layers(nn.Sequential(QuestLinear(4, 2))))
        ['0']
    """
    found = {k: v for k, v in quantized_layers(model).items() if not isinstance(v[0], QuestPackedLinear)}
    if not found:
        raise ValueError(f"the weights of {type(model).__name__} are packed already.")
    return found


def forget_quantizer(model: Any) -> Any:
    """Take the marks of transformers' quantizers off a model, except its configuration; return it.

    Example:
        >>> from torch import nn
        >>> from hfnoise.quantization.hf_export import forget_quantizer
        >>> forget_quantizer(nn.Linear(1, 1))
        Linear(in_features=1, out_features=1, bias=True)
    """
    for name in ("hf_quantizer", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if "is_quantized" in vars(model):
        model.is_quantized = False
    for module in model.modules():
        config = getattr(module, "config", None)
        # Code of flash attention asks whether the attribute is there, not what it says.
        if config is not None and "_is_quantized" in getattr(config, "__dict__", {}):
            del config._is_quantized
    return model


def check_weights(model: nn.Module) -> None:
    """Raise a ValueError that names the first quantised weight with NaN or infinite entries.

    Example:
        >>> from hfnoise.quantization import QuestLinear
        >>> from hfnoise.quantization.hf_export import check_weights
        >>> check_weights(QuestLinear(8, 8))
    """
    for name, module in model.named_modules():
        if isinstance(getattr(module, "quantization", None), LinearQuantization):
            weight = module.weight
            if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta:
                bad = int((~weight.isfinite()).sum())
                if bad:
                    raise ValueError(
                        f"{name}.weight has {bad} entries that are NaN or infinite; it cannot be quantised."
                    )


def set_quantization_config(model: Any, config: QuestConfig | None) -> None:
    """Set what `save_pretrained` writes as `quantization_config`; `None` takes it out. Models without config: nothing.

    Example:
        >>> from torch import nn
        >>> from hfnoise import QuestConfig
        >>> from hfnoise.quantization.hf_export import set_quantization_config
        >>> set_quantization_config(nn.Linear(1, 1), QuestConfig())
    """
    if _of_diffusers(model):  # whose configuration is frozen, and written from its items
        rest = {name: value for name, value in model.config.items() if name != "quantization_config"}
        model._internal_dict = type(model.config)(rest if config is None else {**rest, "quantization_config": config})
    elif hasattr(model, "config"):
        if config is not None:
            model.config.quantization_config = config
        elif hasattr(model.config, "quantization_config"):
            del model.config.quantization_config


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config if isinstance(config, dict) else config.to_dict())
