"""A tiny denoiser with rows to train it on, and a trainer of them."""

import datasets
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from hfnoise import DiffusionTrainer, DiffusionTrainingArguments

SHAPE = (4, 8, 8)
TOKENS, WIDTH = 3, 8


def new_unet(seed=0, **settings):
    """Return a UNet of two levels, 8 wide, with cross-attention in the middle; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            **{
                "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
                "block_out_channels": (8, 8), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "mid_block_type": None, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": WIDTH, "attention_head_dim": 4, "norm_num_groups": 4,
            } | settings
        )  # fmt: skip


def new_scheduler(prediction_type="epsilon", **settings):
    """Return the noise schedule of Stable Diffusion."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type, **settings
    )


def make_rows(count=16, **columns):
    """Return rows of latents and prompt states."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, *SHAPE, generator=generator)
    states = torch.randn(count, TOKENS, WIDTH, generator=generator)
    data = {"latents": latents.numpy(), "encoder_hidden_states": states.numpy(), **columns}
    return datasets.Dataset.from_dict(data).with_format("torch")


def arguments(folder, **settings):
    """Return arguments for three steps of four rows, in order."""
    return DiffusionTrainingArguments(
        **{
            "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 3,
            "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-2,
            "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
            "seed": 3, "train_sampling_strategy": "sequential",
        } | settings
    )  # fmt: skip


def new_trainer(folder, model=None, scheduler=None, rows=None, eval_rows=None, trainer_options=None, **settings):
    """Return a trainer; `settings` are arguments."""
    return DiffusionTrainer(
        model or new_unet(),
        arguments(folder, **settings),
        scheduler=scheduler or new_scheduler(),
        train_dataset=make_rows() if rows is None else rows,
        eval_dataset=eval_rows,
        **(trainer_options or {}),
    )


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(one, other, **tolerance):
    """Compare state dicts, to the bit without a tolerance."""
    assert set(one) == set(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m: m)
