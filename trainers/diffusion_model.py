"""What is done to a denoiser before it is trained: adapters, activation checkpointing, and what is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.training_utils import cast_training_params

from hfnoise.trainers.diffusion_arguments import DiffusionTrainingArguments
from hfnoise.trainers.diffusion_saving import trained_adapter


class TrackedConfig(FrozenDict):
    """The config of a model of diffusers, with the methods that trackers (TensorBoard, MLflow) call on a config."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return dict(self)

    def to_json_string(self) -> str:
        """Return the settings as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)


def prepare_denoiser(model: Any, args: DiffusionTrainingArguments, peft_config: Any = None) -> Any:
    """Return the model, ready to be trained: with the adapter, and recomputing activations if that was asked for.

    Raises:
        TypeError: if it is no model of diffusers.
        ValueError: if nothing of it is trainable, or in half precision, or adapters are asked for twice, or more is
            trainable than the one adapter that is saved.
    """
    if isinstance(model, DiffusionPipeline):
        raise TypeError(f"model is a {type(model).__name__}; give its denoiser: pipe.unet or pipe.transformer.")
    if not isinstance(model, ModelMixin):
        raise TypeError(
            f"model is {model if isinstance(model, str) else type(model)!r}; give a denoiser of diffusers, such as "
            "UNet2DConditionModel.from_pretrained(name, subfolder='unet'). For an adapter give peft_config."
        )
    if peft_config is not None:
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError("the model has an adapter already, so peft_config would add another; give one of them.")
        model.requires_grad_(False)
        model.add_adapter(peft_config)
        cast_training_params(model, dtype=torch.float32)  # a frozen base may stay in half precision
    trainable = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if not trainable:
        raise ValueError(
            "no parameter of the model is trainable; call model.requires_grad_(True), or give peft_config."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        trained_adapter(model)  # now, and not when the trained weights are to be saved
    half = next((name for name, one in trainable.items() if one.dtype != torch.float32), None)
    if half is not None:
        raise ValueError(
            f"{half} is to be trained in {trainable[half].dtype}, which loses small updates. Load the model in "
            "float32 and set bf16=True or fp16=True: then it computes in half precision."
        )
    if args.activation_checkpointing:
        model.enable_gradient_checkpointing()
    model._internal_dict = TrackedConfig(model.config)
    return model


def stock_arguments(args: Any) -> Any:
    """Return arguments that the Trainer itself can work with.

    The Trainer would call `activation_checkpointing_enable`, which models of diffusers do not have; their own method
    has been called by then.

    Raises:
        TypeError: if they are not ours.
        ValueError: for what the Trainer cannot do with a denoiser.
    """
    if not isinstance(args, DiffusionTrainingArguments):
        raise TypeError(
            f"args is a {type(args).__name__}; give DiffusionTrainingArguments, which has the Trainer's and ours."
        )
    if args.deepspeed or args.fsdp:
        refuse_sharded()
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor is {args.label_smoothing_factor}; a denoiser has no labels.")
    if args.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha is {args.neftune_noise_alpha}; it is noise on token embeddings, and a denoiser has "
            "none. See noise_offset and input_perturbation."
        )
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel=True is for models of transformers: a denoiser of diffusers would be trained without "
            "any of its kernels, with a warning. Leave it out; torch_compile=True works."
        )
    if args.activation_checkpointing_kwargs:
        raise ValueError(
            f"activation_checkpointing_kwargs is {args.activation_checkpointing_kwargs}; diffusers' own activation "
            "checkpointing, which is used here, has no settings."
        )
    cleared = copy.copy(args)
    cleared.activation_checkpointing = False
    cleared.gradient_checkpointing = None
    return cleared


def refuse_sharded() -> None:
    """Raise the error of training that holds a model in pieces.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "DeepSpeed and FSDP hold a model in pieces, which save_pretrained of diffusers does not put together. Use "
        "distributed data parallel: torchrun, or accelerate launch without them."
    )
