"""LoRA on quantised layers: PEFT builds its own layers on them; here merging says what it would do to the grid.

hfnoise.registration imports this when PEFT imports `peft.tuners.lora.model`. PEFT's own way for layers of others,
`LoraConfig._register_custom_module`, belongs to one config object and is lost by `PeftModel.from_pretrained`.
"""

from __future__ import annotations

import warnings
from typing import Any

import peft.tuners.lora.model as lora_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer

from hfnoise.quantization.linear import LinearQuantization
from hfnoise.quantization.packed_linear import QuestPackedLinear

_PACKED = (
    "LoRA cannot be merged into packed weights: they hold codes of a grid. Keep the adapter beside the model, "
    "or load the master weights (store_master_weights=True), merge into those and export_packed again."
)


class PackedLoraLinear(Linear):  # type: ignore[misc]
    """LoRA on packed weights: adapters train and are saved as ever, merging is refused: the sum has no grid."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise: packed weights hold codes of a grid, to which nothing can be added."""
        raise ValueError(_PACKED)


class QuestLoraLinear(Linear):  # type: ignore[misc]
    """LoRA on master weights; a merge goes into the floats, which are then quantised: the sum is rounded anew."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge, and warn: the merged model computes something else than base and adapter did."""
        if isinstance(self.get_base_layer(), QuestPackedLinear):  # by export_packed, under the adapter
            raise ValueError(_PACKED)
        warnings.warn(
            "LoRA is merged into master weights, which are quantised in every forward: what the adapter added is "
            "rounded to their grid. Evaluate after merging, or keep the adapter beside the model.",
            stacklevel=2,
        )
        super().merge(safe_merge, adapter_names)


_stock_dispatch = lora_model.dispatch_default


def _dispatch(target: Any, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any) -> Any:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if parameter_name is not None or not isinstance(getattr(base, "quantization", None), LinearQuantization):
        return _stock_dispatch(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)
    packed = isinstance(base, QuestPackedLinear)
    if packed and config.use_dora:
        raise ValueError(
            "use_dora needs the norms of float weights, and these are packed. Load master weights, or use LoRA."
        )
    transposed = not packed and getattr(base, "transposed", False)
    config.fan_in_fan_out = transposed
    kind = PackedLoraLinear if packed else QuestLoraLinear
    return kind(target, adapter_name, config=config, is_target_conv_1d_layer=transposed, **kwargs)


# Once, also if this module is imported again by another path.
if getattr(_stock_dispatch, "__module__", "") != __name__:
    lora_model.dispatch_default = _dispatch
