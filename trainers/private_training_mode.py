"""What a model does in training mode only, where the gradients of units are not what `dp_check` sees in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

# Settings of transformers' models that draw one number for a whole batch: which layers rest, how many masks there are.
_SHARED_DRAWS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "apply_spec_augment")


def refuse_training_mode(trainer: Any, config: Any) -> None:
    """Raise ValueError for what ties the rows of a batch together as soon as the model is in training mode.

    Args:
        trainer (`transformers.Trainer`): built, not yet trained; `from_pretrained` leaves a model in eval mode.
        config ([`DPConfig`]): the privacy settings.
    """
    with training_mode(trainer.model):
        for name, module in trainer.model.named_modules():
            # With grad_mode="loop" as well: the running averages are saved with the weights, without noise.
            statistics = isinstance(module, _NormBase) and module.track_running_stats
            if module.training and (statistics or isinstance(module, _BatchNorm)):
                raise ValueError(
                    f"module {name!r} is a {type(module).__name__}: in training it normalises a row by the others of "
                    "the batch, or keeps averages of private rows without noise, so that clipping does not bound what "
                    "one unit changes and the stated epsilon would be false. Use GroupNorm or LayerNorm, or a module "
                    "whose `train` leaves it in eval mode."
                )
    if config.grad_mode == "loop":
        return  # every unit is a batch of its own
    if trainer.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha={trainer.neftune_noise_alpha} scales its noise by the length of the longest row of "
            "the batch: the loss of a unit would depend on the other rows, so clipping would not bound what one unit "
            "changes. Leave it out, or use grad_mode='loop', which takes every unit alone."
        )
    settings = getattr(trainer.model, "config", None)
    for name in _SHARED_DRAWS:
        if getattr(settings, name, 0):
            raise ValueError(
                f"{name}={getattr(settings, name)} of the model draws at random for a whole batch at once: what "
                "happens to one unit would depend on which others are there, and the stated epsilon would be false. "
                f"Load the model with {name}=0, or use grad_mode='loop', which takes every unit alone."
            )


def kept_values(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return what changes when a forward pass writes into a buffer that is saved with the weights.

    Args:
        model (`nn.Module`): whose running averages, counts and the like are looked at; their values are not read.
    """
    saved = model.state_dict().keys()
    return {
        name: (id(value), value._version)
        for name, value in model.named_buffers()
        if name in saved and not value.is_inference()
    }


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in training mode as the Trainer does; afterwards every module is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        # Not by `train(False)`: bitsandbytes packs 4-bit weights for the CPU anew when it leaves the training mode.
        for module, mode in modes.items():
            module.training = mode
