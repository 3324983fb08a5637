"""Layers in the networks of a pipeline that diffusers writes so that nothing reads them again."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_layers(components: dict[str, Any]) -> None:
    """Raise ValueError if a network carries layers that a saved pipeline would lose, before anything is written.

    Stock writes the weights beneath a LoRA by other names, so that they are random in what is loaded, and leaves the
    IP-Adapter of a UNet or transformer out of it. Layers of bitsandbytes that were put in by hand are in no
    configuration: those of 8 bits are read as float weights without their scales, those of 4 bits not at all. Images
    would be others, mostly without an error.

    Args:
        components (`dict`): of the pipeline, by name.

    Example:
        >>> from peft import LoraConfig
        >>> from hfnoise.pipelines.unsaved_layers import check_layers
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe = new_digits_pipeline(width=8)
        >>> pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        >>> check_layers(pipe.components)
        Traceback (most recent call last):
        ...
        ValueError: unet carries adapters of PEFT...
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, part in components.items():
        if not isinstance(part, nn.Module):
            continue
        if any(isinstance(module, BaseTunerLayer) for module in part.modules()):
            raise ValueError(
                f"{name} carries adapters of PEFT, such as a LoRA. Saved with the pipeline its own weights would get "
                "names that from_pretrained does not read, and be random when they are loaded. Save the adapters by "
                "themselves (save_lora_weights, or save_lora_adapter of the network) and take them off with "
                "pipe.unload_lora_weights(), after pipe.fuse_lora() if they are to stay in the weights."
            )
        if _quantized_by_hand(part):
            raise ValueError(
                f"{name} has layers of bitsandbytes that were put in by hand: its configuration does not say so, and "
                "from_pretrained would read their bytes as the weights of ordinary layers. Save the pipeline with the "
                f"ordinary layers, and quantise it when it is loaded: {type(part).__name__}.from_pretrained(..., "
                "quantization_config=BitsAndBytesConfig(...)), which can be saved as it is."
            )
        if any("IPAdapter" in type(processor).__name__ for processor in getattr(part, "attn_processors", {}).values()):
            raise ValueError(
                f"{name} carries an IP-Adapter, which the saved pipeline would be loaded without. Take it off with "
                "pipe.unload_ip_adapter(), and give it to the loaded pipeline with load_ip_adapter."
            )


def _quantized_by_hand(part: nn.Module) -> bool:
    layers = any(type(module).__module__.startswith("bitsandbytes.") for module in part.modules())
    # diffusers and transformers leave it where they put the layers in.
    return layers and getattr(part, "hf_quantizer", None) is None
