"""The quantizer that diffusers calls for quant_method "quest"; importing this module registers it.

hfnoise.registration imports it when diffusers imports `diffusers.quantizers.auto`, never earlier. The configuration is
the one that transformers knows, so `PipelineQuantizationConfig(quant_backend="quest")` serves all parts of a pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from hfnoise.quantization.hf_config import QuestConfig
from hfnoise.quantization.hf_export import check_weights, dequantize, set_quantization_config
from hfnoise.quantization.hf_layers import layers_to_convert, linear_quantization, packed_layer, quantize_layers
from hfnoise.quantization.packed_linear import QuestPackedLinear


class QuestDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Loads models of diffusers with a [`hfnoise.QuestConfig`]: as [`QuestHfQuantizer`] does those of transformers.

    Departure from other quantizers: the model can be cast afterwards, as any other.

    Example:
        >>> import hfnoise
        >>> from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        >>> AUTO_QUANTIZER_MAPPING["quest"].__name__
        'QuestDiffusersQuantizer'
    """

    # Otherwise diffusers rounds what a model keeps in float32 to the dtype of the rest.
    use_keep_in_fp32_modules = True
    quantization_config: QuestConfig

    def __init__(self, quantization_config: QuestConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.dequantize:
            raise ValueError(
                "dequantize=True is for models of transformers; load this one packed, then hfnoise.dequantize(model)."
            )
        self._to_pack: set[str] = set()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise for weights that would go to the disk, where diffusers reads no buffers."""
        device_map = kwargs.get("device_map")
        packed = not self.quantization_config.store_master_weights
        if packed and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map sends packed weights to the disk, and diffusers does not bring them back. Keep them "
                "in memory, where they take their few bits, or use enable_group_offload."
            )

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Return the keys as they are; raise for those without which a packed layer would hold anything at all."""
        needed = [key for key in missing_keys if self._is_packed_part(model, key)]
        if needed:
            raise ValueError(
                f"the checkpoint lacks {len(needed)} packed weights or scales ({min(needed)}, ...). It does not "
                "fit the model, or was written incompletely."
            )
        return missing_keys

    def _is_packed_part(self, model: nn.Module, key: str) -> bool:
        module_name, _, name = key.rpartition(".")
        if name == "weight" and module_name in self._to_pack:
            return True
        return name in ("weight", "weight_scale") and isinstance(model.get_submodule(module_name), QuestPackedLinear)

    @property
    def supports_parallel_loading(self) -> bool:
        """Return whether files can be read by threads: not while layers are swapped."""
        return self.pre_quantized or self.quantization_config.store_master_weights

    def _process_model_before_weight_loading(
        self, model: nn.Module, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if state_dict is not None:  # from_single_file, which does not know what it loads
            self.pre_quantized = any(name.endswith(".weight_scale") for name in state_dict)
        if config.store_master_weights or self.pre_quantized:
            quantize_layers(model, config, not config.store_master_weights, stored=self.pre_quantized)
        else:
            # Layers stay until their weight comes: diffusers compares its shape with that of the model.
            chosen, skipped = layers_to_convert(model, config)
            self._to_pack = set(chosen)
            model.quest_skipped = skipped  # type: ignore[assignment]
        set_quantization_config(model, config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._to_pack:
            left = sorted(self._to_pack)
            raise ValueError(
                f"{len(left)} weights were not packed ({left[0]}, ...): diffusers sent them to the disk, or did not "
                "find them. Load without offload_state_dict and offload_folder."
            )
        check_weights(model)
        # Its only use is to refuse casts, which do no harm here: those of master weights are usual in training, packed
        # ones keep codes and scales. `save_lora_adapter` casts, if only to `None`.
        model.is_quantized = False
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Return whether [`create_quantized_param`] takes care of a parameter: weights to pack, and scales."""
        module_name, _, name = param_name.rpartition(".")
        if name == "weight":
            return module_name in self._to_pack
        return name == "weight_scale" and isinstance(model.get_submodule(module_name), QuestPackedLinear)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Pack a weight, or set a scale in float32, which diffusers has cast to the dtype of the model."""
        module_name, _, name = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        if name == "weight_scale":
            module.weight_scale = state_dict[param_name].to(target_device, torch.float32)
            return
        made = packed_layer(module, linear_quantization(self.quantization_config))
        try:
            made.set_weight(param_value.to(target_device))
        except ValueError as error:
            raise ValueError(f"{param_name}: {error}") from error
        model.set_submodule(module_name, made.train(module.training))
        self._to_pack.discard(module_name)

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> None:
        """Raise a ValueError if the checkpoint has another number of scales."""
        current, loaded = (tuple(getattr(param, "shape", param)) for param in (current_param, loaded_param))
        if current != loaded:
            raise ValueError(f"{param_name} has shape {loaded} in the checkpoint, and {current} in the model.")

    def _dequantize(self, model: Any) -> Any:
        return dequantize(model)

    @property
    def is_serializable(self) -> bool:
        """Return True: packed weights are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: master weights can be trained, and adapters on packed ones."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Return True."""
        return True


AUTO_QUANTIZATION_CONFIG_MAPPING["quest"] = QuestConfig
AUTO_QUANTIZER_MAPPING["quest"] = QuestDiffusersQuantizer
