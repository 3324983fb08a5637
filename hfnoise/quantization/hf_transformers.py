"""The quantizer that `from_pretrained` calls for quant_method "quest"; importing this module registers it.

hfnoise.registration imports it when transformers imports `transformers.quantizers.auto`, never earlier. That may be
while hf_layers or hf_export are being imported themselves, so it imports them when a method needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, _IdentityOp
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from hfnoise.quantization.codes import decode
from hfnoise.quantization.hf_config import QuestConfig
from hfnoise.quantization.linear import LinearQuantization
from hfnoise.quantization.packed_linear import QuestPackedLinear, pack_weight
from hfnoise.quantization.packing import packed_length, unpack


class QuestHfQuantizer(HfQuantizer):
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

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hfnoise.quantization.hf_layers import layers_to_convert, quantize_layers

        if self.pre_quantized and self.quantization_config.dequantize:
            # Only to know the shapes that the packed bytes do not tell; the layers stay what they are.
            self._dense_shapes = {
                name: module for name, module in layers_to_convert(model, self.quantization_config)[0].items()
            }
            return model
        return quantize_layers(
            model, self.quantization_config, packed=not self.quantization_config.store_master_weights
        )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hfnoise.quantization.hf_export import forget_quantizer

        if self.quantization_config.dequantize or not self.quantization_config.store_master_weights:
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

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from hfnoise.quantization.hf_export import dequantize

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


def check_weights(model: nn.Module) -> None:
    """Raise a ValueError that names the first quantised weight with NaN or infinite entries.

    Example:
        >>> from hfnoise.quantization import QuestLinear
        >>> from hfnoise.quantization.hf_transformers import check_weights
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


# Not by the decorators, which refuse a second registration: of a reloaded module, or a second import path.
AUTO_QUANTIZATION_CONFIG_MAPPING["quest"] = QuestConfig
AUTO_QUANTIZER_MAPPING["quest"] = QuestHfQuantizer
