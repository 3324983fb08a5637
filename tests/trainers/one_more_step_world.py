"""A tiny module of One More Step, in both forms, and a trainer of it."""

import torch

from hfnoise import OneMoreStepTrainer, OneMoreStepTrainingArguments, TimeFreeUNet2DConditionModel
from tests.trainers.diffusion_world import TOKENS, WIDTH, arguments, make_rows, new_unet

EMPTY = {"encoder_hidden_states": torch.zeros(1, TOKENS, WIDTH)}


def new_module(stock=False, **settings):
    """Return a module with the weights of `new_unet`."""
    unet = new_unet(**settings)
    if stock:
        return unet
    module = TimeFreeUNet2DConditionModel.from_config(unet.config)
    module.load_state_dict({name: one for name, one in unet.state_dict().items() if "time_emb" not in name})
    return module


def new_step_trainer(folder, module=None, rows=None, eval_rows=None, options=None, **settings):
    """Return a trainer; `settings` are arguments."""
    given = {"prompt_dropout": 0.0, "ema_decay": None} | settings
    stock = arguments(folder)
    names = (
        "output_dir", "use_cpu", "bf16", "report_to", "max_steps", "per_device_train_batch_size",
        "per_device_eval_batch_size", "learning_rate", "lr_scheduler_type", "logging_steps", "save_strategy",
        "disable_tqdm", "seed", "train_sampling_strategy",
    )  # fmt: skip
    args = OneMoreStepTrainingArguments(**{name: getattr(stock, name) for name in names} | given)
    return OneMoreStepTrainer(
        module or new_module(),
        args,
        train_dataset=make_rows() if rows is None else rows,
        eval_dataset=eval_rows,
        **({"empty_prompt": EMPTY} if args.prompt_dropout else {}) | (options or {}),
    )
