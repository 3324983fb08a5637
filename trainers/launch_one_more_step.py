"""What `hfnoise one-more-step` runs: OneMoreStepTrainer on images with captions, from YAML and command line."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfnoise.errors import UsageError
from hfnoise.folders import check_writable
from hfnoise.trainers.command_line import given_names
from hfnoise.trainers.launch import last_metrics, run_command, save, share

if TYPE_CHECKING:
    from hfnoise.trainers.encoded_images import EncodedImages
    from hfnoise.trainers.image_arguments import OneMoreStepScriptArguments

logger = logging.getLogger(__name__)

_NEEDED = {
    "model_name_or_path": "a Hub id, a folder, or digits",
    "dataset_name": "a Hub id, a local file or folder, or hfnoise:digits",
}
# The published base modules: https://huggingface.co/h1t/oms_b_openclip_15_21.
_PUBLISHED_WIDTHS = (160, 320, 640)
_HEAD_WIDTH = 32
# diffusers' own number of groups, where the widths allow it.
_MOST_GROUPS = 32


def train_module(arguments: Sequence[str]) -> int:
    """Train a module of One More Step from a command line and return the exit code.

    Args:
        arguments (`Sequence[str]`): name of the method, then its options: those of
            [`~hfnoise.OneMoreStepTrainingArguments`] and
            [`~hfnoise.trainers.image_arguments.OneMoreStepScriptArguments`].

    Raises:
        UsageError: for options, images, a pipeline or a module that cannot be trained; before anything is trained.
    """
    needed = {} if "world" in given_names(arguments) else _NEEDED
    return run_command(arguments, _types, _train, needed)


def _types(name: str) -> tuple[type, ...]:
    from hfnoise.trainers.image_arguments import OneMoreStepScriptArguments
    from hfnoise.trainers.one_more_step_arguments import OneMoreStepTrainingArguments

    return OneMoreStepScriptArguments, OneMoreStepTrainingArguments


def _train(name: str, script: OneMoreStepScriptArguments, training: Any) -> None:
    try:
        trainer = _trainer(script, training)
        checkpoint = trainer.checkpoint_to_resume(training.resume_from_checkpoint)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = last_metrics(trainer)
    save(trainer, training, script)
    if trainer.is_world_process_zero():
        _print_outcome(script, training, metrics)
    share(trainer, training, script)
    trainer.end()


def _trainer(script: OneMoreStepScriptArguments, training: Any) -> Any:
    from hfnoise.trainers.diffusion_latents import encode_prompts
    from hfnoise.trainers.encoded_images import encode_images, load_training_pipeline, name_pipeline
    from hfnoise.trainers.one_more_step import OneMoreStepTrainer

    check_writable(training.output_dir)
    if script.world:
        data = _brightness(training.seed)
        module = _fitting_module(script, training.seed, data.train[0]["latents"].shape[0], data.empty_prompt)
    else:
        pipe = load_training_pipeline(script, training.device, denoiser=False)
        # Before the images are encoded, which may take hours.
        module = _fitting_module(script, training.seed, pipe.vae.config.latent_channels, encode_prompts(pipe, [""]))
        data = encode_images(script, training, pipe)
    trainer = OneMoreStepTrainer(
        module, training, train_dataset=data.train, eval_dataset=data.evaluation, empty_prompt=data.empty_prompt
    )
    name_pipeline(trainer, script)  # for the card
    return trainer


def _fitting_module(script: OneMoreStepScriptArguments, seed: int, channels: int, empty_prompt: Any) -> Any:
    """Return [`new_module`] for latents and text states, after a check that it reads those."""
    from transformers import set_seed

    from hfnoise.trainers.diffusion_rows import STATES

    width = empty_prompt[STATES].shape[-1]
    set_seed(seed)
    module = new_module(script, channels, width)
    found = module.config.cross_attention_dim
    if found != width:
        raise ValueError(
            f"the module {script.module_name_or_path!r} takes text states {found} wide (cross_attention_dim), and "
            f"those of {script.model_name_or_path or script.world!r} are {width} wide. Train it with the text "
            "encoder that it reads, or make a new one: leave --module_name_or_path out."
        )
    return module


def _brightness(seed: int) -> EncodedImages:
    import torch

    from hfnoise.trainers.encoded_images import EncodedImages
    from hfnoise.worlds import brightness

    generator = torch.Generator().manual_seed(seed)
    rows = [brightness.brightness_rows(count, generator) for count in (brightness.ROWS, brightness.TEST_ROWS)]
    return EncodedImages(rows[0], rows[1], {"encoder_hidden_states": brightness.empty_states(1)})


def new_module(script: OneMoreStepScriptArguments, channels: int, width: int) -> Any:
    """Return the module to train: a new one of the sizes that are asked for, or the one that is gone on with.

    The first level has no attention, as in the published modules.

    Args:
        script ([`~hfnoise.trainers.image_arguments.OneMoreStepScriptArguments`]): of the command line.
        channels (`int`): of the latents.
        width (`int`): of the text states.

    Raises:
        ValueError: for sizes that do not go together.

    Example:
        >>> from hfnoise.trainers.image_arguments import OneMoreStepScriptArguments
        >>> from hfnoise.trainers.launch_one_more_step import new_module
        >>> script = OneMoreStepScriptArguments(world="brightness", block_out_channels=[8, 16])
        >>> new_module(script, channels=4, width=3).config.down_block_types
        ('DownBlock2D', 'CrossAttnDownBlock2D')
    """
    import torch

    from hfnoise.latents.hf_checkpoints import load_module
    from hfnoise.latents.hf_time_free_unet import TimeFreeUNet2DConditionModel

    if script.module_name_or_path:
        variant = script.module_variant
        module: Any = load_module(script.module_name_or_path, variant=variant, dtype=torch.float32)
        return module
    widths = tuple(script.block_out_channels or _PUBLISHED_WIDTHS)
    levels = len(widths) - 1
    heads = script.attention_head_dim or [max(1, one // _HEAD_WIDTH) for one in widths]
    # A number is for all levels.
    depths = script.transformer_layers_per_block or [1]
    return TimeFreeUNet2DConditionModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=script.layers_per_block or 2,
        transformer_layers_per_block=depths[0] if len(depths) == 1 else tuple(depths),
        attention_head_dim=heads[0] if len(heads) == 1 else tuple(heads),
        norm_num_groups=script.norm_num_groups or math.gcd(_MOST_GROUPS, *widths),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * levels),
        up_block_types=(*["CrossAttnUpBlock2D"] * levels, "UpBlock2D"),
        cross_attention_dim=width,
    )


def _print_outcome(script: OneMoreStepScriptArguments, training: Any, metrics: dict[str, float]) -> None:
    explained = metrics.get("eval_low_frequency_r2")
    if explained is not None:
        print(f"low-frequency R2: {explained:.3f} (share of the variance of the brightness that the module explains)")
    folder = training.output_dir
    print(f"module, terminal prior and card are in {folder}; in Python: OneMoreStep.from_pretrained({str(folder)!r})")
    if script.model_name_or_path:
        print(
            f"use it: hfnoise generate --model_name_or_path {script.model_name_or_path} --oms_module {folder} "
            '--prompt "..."'
        )
