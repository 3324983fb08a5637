"""What cannot be private, refused by name at construction, with the guarantee that would be lost."""

from __future__ import annotations

import logging
from typing import Any

from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset as TorchIterableDataset

from hfnoise.trainers.ignored_settings import refuse_ignored_settings
from hfnoise.trainers.private_training_mode import refuse_training_mode

logger = logging.getLogger(__name__)

_SEPARABLE = (
    "the loss of a unit then depends on the other rows of the batch, so clipping does not bound what one unit changes "
    "and the stated epsilon would be false"
)
# Trainer -> why its loss is not a sum over units. Classes are recognised by name, also as ancestors.
_TRAINERS = {
    "KTOTrainer": "its KL term pairs every completion with another prompt of the batch",
    "DrDPOTrainer": "it weighs every pair by a log-mean-exp over the batch",
    "BVPOTrainer": "its share is estimated from gradients of the batch",
    "GRPOTrainer": "its advantages are relative to a group of completions",
    "RLOOTrainer": "its advantages are relative to a group of completions",
    "OnlineDPOTrainer": "it ranks completions that it samples from the model in training",
    "PPOTrainer": "its advantages are normalised over the batch",
}
_PAIR_LOSSES = {
    "aot": "it sorts margins over the batch",
    "aot_unpaired": "it sorts log-probabilities over the batch",
    "sft": "its term is a mean over all tokens of the batch, so each pair's share depends on the others",
}


def refuse_trainer(trainer: Any, config: Any) -> None:
    """Raise ValueError for what would break the guarantee; log what costs privacy outside of it.

    Args:
        trainer (`transformers.Trainer`): built, not yet trained.
        config ([`DPConfig`]): the privacy settings.
    """
    args = trainer.args
    _refuse_arguments(args)
    refuse_ignored_settings(args)
    _refuse_engines(trainer, config)
    _refuse_data(trainer)
    _refuse_losses(trainer, args)
    refuse_training_mode(trainer, config)
    if config.unsafe_seed is not None:
        logger.warning("unsafe_seed=%d: anybody can subtract the noise. This run is NOT PRIVATE.", config.unsafe_seed)
    if args.load_best_model_at_end or args.save_strategy == "best":
        logger.warning(
            "the checkpoint is chosen by its evaluation: if the evaluation data is private, that choice is outside of "
            "the guarantee. The report says so."
        )


def _refuse_arguments(args: Any) -> None:
    if args.max_grad_norm not in (None, 0, 0.0, 1.0):
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm} would clip the mean gradient after the noise and add nothing to "
            "privacy. Leave it out; the norm to which the gradient of each unit is clipped is DPConfig(clip_norm=...)."
        )
    if args.fp16:
        raise ValueError(
            "fp16=True scales gradients by a factor that changes, and skips steps, depending on the private data: "
            "neither clip_norm nor the number of releases would be what the accounting assumes. Use bf16=True."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True runs steps again that are already released, which no ledger would count. Set "
            "DPConfig(micro_batch_size=...) to what fits into memory; only dropout is drawn differently."
        )
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    if strategy != "random":
        raise ValueError(
            f"train_sampling_strategy={strategy!r} puts rows into batches by what they are. The accounting assumes "
            "that every unit is drawn independently with one probability (Poisson sampling). Use 'random'."
        )
    for name in ("packing", "padding_free", "prefix_sharing"):
        if getattr(args, name, False):
            raise ValueError(f"{name}=True puts several units into one row: {_SEPARABLE}. Use {name}=False.")
    if str(args.include_num_input_tokens_seen) not in ("no", "False"):
        raise ValueError(
            "include_num_input_tokens_seen logs the exact size of private batches, which the guarantee does not "
            "cover. Use 'no'."
        )
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optimizer or "layerwise" in optimizer:
        raise ValueError(
            f"optim={optimizer!r} updates weights during the backward pass, before gradients are clipped and noised: "
            "nothing would be private. Use another optimizer, for example adamw_torch or sgd."
        )
    hub_strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if args.push_to_hub and hub_strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            f"hub_strategy={hub_strategy!r} would upload checkpoints with the states of random generators and of the "
            "run. Use 'every_save' or 'end', which push the model, its card and its privacy report."
        )


def _refuse_engines(trainer: Any, config: Any) -> None:
    sharded = [
        name for name, value in trainer.model.named_parameters() if value.requires_grad and isinstance(value, DTensor)
    ]
    if sharded:
        raise ValueError(
            f"trainable parameters are sharded over processes ({', '.join(sharded[:3])}, ...): a process would clip a "
            "part of a unit's gradient. Shard the frozen base alone and add the adapter afterwards, so that it stays "
            "whole on every process."
        )
    offloaded = [name for name, value in trainer.model.named_parameters() if value.requires_grad and value.is_meta]
    if offloaded:
        raise ValueError(
            f"trainable parameters are offloaded ({', '.join(offloaded[:3])}, ...), so they cannot be updated. Give "
            "the layers that carry adapters a device (device_map), or put adapters on other layers "
            "(layers_to_transform); frozen layers may be offloaded."
        )
    sizes = {"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size(), "sequence": trainer.get_sp_size()}
    for kind, size in sizes.items():
        if size > 1:
            raise ValueError(
                f"{kind} parallelism over {size} processes gives several processes the same rows, which would be "
                "counted twice. Use DistributedDataParallel, or shard the frozen base (FSDP2 at load time)."
            )
    if config.grad_mode == "loop" and getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "grad_mode='loop' with a model sharded at load time: transformers averages ordinary gradients over the "
            "processes before they could be clipped per unit. Use grad_mode='leaf'."
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed owns the gradients, so they cannot be clipped per unit. Use DistributedDataParallel."
        )
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "FSDP as accelerate sets it up shards the trainable parameters, so a process would clip a part of a "
            "unit's gradient. Use DistributedDataParallel; for a base larger than one device device_map='auto', or "
            "shard the frozen base alone and keep the adapters whole."
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"torch's DataParallel over {trainer.args.n_gpu} GPUs is not supported: it replicates modules behind the "
            "per-unit gradients. Start with `accelerate launch --multi_gpu`, or show one GPU (CUDA_VISIBLE_DEVICES=0)."
        )


def _refuse_data(trainer: Any) -> None:
    dataset = trainer.train_dataset
    if dataset is None:
        raise ValueError("a private Trainer needs train_dataset: the sample rate depends on its length.")
    if isinstance(dataset, TorchIterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            "a streaming train_dataset has no length and no random access, so units cannot be drawn independently "
            "(Poisson sampling) and epsilon is not known. Load it as a map-style dataset."
        )
    if len(dataset) == 0:
        raise ValueError("train_dataset is empty.")


def _refuse_losses(trainer: Any, args: Any) -> None:
    for ancestor in type(trainer).__mro__:
        if ancestor.__name__ in _TRAINERS:
            raise ValueError(f"{ancestor.__name__} cannot be private: {_TRAINERS[ancestor.__name__]}; {_SEPARABLE}.")
    losses = getattr(args, "loss_type", None) or []
    for loss in [losses] if isinstance(losses, str) else losses:
        if loss in _PAIR_LOSSES:
            raise ValueError(
                f"loss_type {loss!r} cannot be private: {_PAIR_LOSSES[loss]}; {_SEPARABLE}. Private are for example "
                "sigmoid, robust, ipo, hinge, sigmoid_norm."
            )
    settings = getattr(trainer.model, "config", None)
    if getattr(trainer, "aux_loss_enabled", False) or getattr(settings, "output_router_logits", False):
        raise ValueError(
            f"the auxiliary loss of a mixture of experts balances the whole batch: {_SEPARABLE}. Load the model with "
            "output_router_logits=False and router_aux_loss_coef=0."
        )
