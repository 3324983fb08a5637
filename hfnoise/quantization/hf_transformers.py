"""The quantizer that `from_pretrained` calls for quant_method "quest"; importing this module registers it.

hfnoise.registration imports it when transformers imports `transformers.quantizers.auto`, never earlier.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, _IdentityOp
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from hfnoise.quantization.codes import decode
from hfnoise.quantization.hf_config import QuestConfig
from hfnoise.quantization.hf_export import check_weights, dequantize, forget_quantizer
from hfnoise.quantization.hf_layers import layers_to_convert, quantize_layers
from hfnoise.quantization.packed_linear import QuestPackedLinear, pack_weight
from hfnoise.quantization.packing import packed_length, unpack


class QuestHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads models with a [`hfnoise.QuestConfig`]: master weights to train, packed ones to run, or both from floats.

    Departure from other quantizers: a model with master weights is an ordinary model afterwards (no `hf_quantizer`).
    With one, `save_pretrained(state_dict=...)` ignores the weights that FSDP and ZeRO-3 gathered, `.half()` raises
    and the Trainer refuses to train.

    Example:
        >>> from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        >>> import hfnoise
        >>> AUTO_QUANTIZER_MAPPING["quest"].__name__
        'QuestHfQuantizer'
    """

    requires_calibration = False
    quantization_config: QuestConfig
    serialized_names = {"weight": ["weight", "weight_scale"]}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise for packed weights on the disk, which accelerate does not bring back."""
        device_map, config = kwargs.get("device_map"), self.quantization_config
        on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        if on_disk and not (config.store_master_weights or config.dequantize):
            raise ValueError(
                "device_map sends packed weights to the disk, and accelerate does not bring them back. Keep them "
                "in memory, where they take their few bits."
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized and self.quantization_config.dequantize:
            if self.quantization_config.activation_bits is not None:
                raise ValueError(
                    f"dequantize=True: the checkpoint quantises inputs too (activation_bits="
                    f"{self.quantization_config.activation_bits}), and stock layers do not, so the float model would "
                    "compute something else. Load it packed, then hfnoise.dequantize(model, weight_only=True)."
                )
            layers_to_convert(model, self.quantization_config, stored=True)  # raises; the layers stay what they are
            return model
        packed = not self.quantization_config.store_master_weights
        return quantize_layers(model, self.quantization_config, packed, stored=self.pre_quantized)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.quantization_config.dequantize:
            return model
        if not self.quantization_config.store_master_weights:
            _check_all_loaded(model)
            return model
        check_weights(model)
        if not self.pre_quantized:
            # A float checkpoint has no learned steps: what stands there is memory that nobody wrote.
            for name, parameter in model.named_parameters():
                if name.endswith(("weight_step", "activation_step")):
                    nn.init.zeros_(parameter)
        return forget_quantizer(model)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a float weight of the checkpoint is packed while it is loaded."""
        module_name, _, name = param_name.rpartition(".")
        return (
            not self.pre_quantized
            and name == "weight"
            and isinstance(model.get_submodule(module_name), QuestPackedLinear)
        )

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that packs a float weight."""
        return _Pack()

    def get_load_operations(self) -> dict[str, Any]:
        """Return the operation that makes floats of a packed weight, for `dequantize=True`."""
        return {"dequantize": _Dequantize}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return the conversions of the model as they are, and ours: the experts that they stack are never packed."""
        return [*weight_conversions, *self.get_weight_conversions()]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return dequantize(model, dtype=dtype)

    def is_serializable(self) -> bool:
        """Return True: packed weights are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters can be trained on packed weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Return whether the weights themselves can be trained."""
        return self.quantization_config.store_master_weights

    @property
    def is_compileable(self) -> bool:
        """Return True."""
        return True


def _check_all_loaded(model: nn.Module) -> None:
    """Raise for packed tensors that no checkpoint filled; transformers reports them and goes on."""
    lacking = [
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, QuestPackedLinear)
        for part in ("weight", "weight_scale")
        if not getattr(getattr(module, part), "is_meta", False)
        and not hasattr(getattr(module, part), "_is_hf_initialized")
    ]
    if lacking:
        raise ValueError(
            f"the checkpoint lacks {len(lacking)} packed weights or scales ({lacking[0]}, ...). It does not fit the "
            "model, or was written incompletely."
        )


class _Pack(ConversionOps):  # type: ignore[misc]
    """Float weight -> packed weight and scale, while a checkpoint is loaded."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        model, missing = kwargs["model"], kwargs.get("missing_keys")
        converted: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module = model.get_submodule(name.rpartition(".")[0])
            try:
                packed, scale = pack_weight(weight.t() if module.transposed else weight, module.quantization)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            converted |= {name: packed, f"{name}_scale": scale}
            if missing is not None:
                missing.discard(f"{name}_scale")
        return converted

    @property
    def reverse_op(self) -> ConversionOps:
        return _IdentityOp()


class _Dequantize(ConversionOps):  # type: ignore[misc]
    """Packed weight and scale -> float weight, for `dequantize=True`."""

    def __init__(self, hf_quantizer: QuestHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        # The converter comes by for every `*.weight`: norms and embeddings have no scale and pass.
        found = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        scales = [value for key, value in found.items() if key.endswith("weight_scale")]
        if not scales:
            return input_dict
        (packed,) = (value for key, value in found.items() if not key.endswith("weight_scale"))
        config, name = self.hf_quantizer.quantization_config, kwargs["full_layer_name"]
        module = kwargs["model"].get_submodule(name.rpartition(".")[0])
        transposed = type(module).__name__ == "Conv1D"
        length = module.weight.shape[0 if transposed else 1]
        expected = (1, len(scales[0]), packed_length(length, config.weight_bits))
        if tuple(packed.shape) != expected:
            raise ValueError(f"{name}: the packed weight has shape {tuple(packed.shape)}, not {expected}.")
        codes = unpack(packed[0], config.weight_bits, length)
        weight = decode(
            codes, scales[0][:, None], config.weight_bits, config.hadamard_group, dtype=module.weight.dtype
        )
        return {name: weight.t().contiguous() if transposed else weight}

    @property
    def reverse_op(self) -> ConversionOps:
        return _IdentityOp()


# Not by the decorators, which refuse a second registration: of a reloaded module, or a second import path.
AUTO_QUANTIZATION_CONFIG_MAPPING["quest"] = QuestConfig
AUTO_QUANTIZER_MAPPING["quest"] = QuestHfQuantizer
# Those of which a setting given to `from_pretrained` wins over that of a checkpoint: here `dequantize`, which would be
# dropped with a warning.
_auto: Any = import_module("transformers.quantizers.auto")
if QuestConfig not in _auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
    _auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (QuestConfig,)
