"""Builds a trainer of any class on the tiny model."""

import pytest


@pytest.fixture
def make_trainer(tiny_model_path, tokenizer, cpu_arguments, make_pairs):
    """Return `make(trainer_class, config_class, pairs, eval_pairs, peft_config, **settings)`."""

    def make(trainer_class, config_class, pairs=None, eval_pairs=None, peft_config=None, callbacks=None, **settings):
        return trainer_class(
            tiny_model_path,
            args=config_class(**cpu_arguments | settings),
            train_dataset=make_pairs(16) if pairs is None else pairs,
            eval_dataset=eval_pairs,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return make


@pytest.fixture
def losses_of():
    """Return the losses that a trainer logged, one per step."""
    return lambda trainer: [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def make_texts():
    """Return a function that makes a dataset of short texts of different lengths, deterministic."""
    import torch
    from datasets import Dataset

    from tests.conftest import WORDS

    def make(count=24, **columns):
        generator = torch.Generator().manual_seed(0)
        lines = [
            " ".join(WORDS[i] for i in torch.randint(len(WORDS), (4 + number % 7,), generator=generator).tolist())
            for number in range(count)
        ]
        return Dataset.from_dict({"text": lines, **columns})

    return make


@pytest.fixture
def make_private_trainer(tiny_model_path, tokenizer, cpu_arguments, make_texts, make_pairs):
    """Return `make(trainer_class, dp_config settings, data, peft, **training arguments)`: a private Trainer."""
    from peft import LoraConfig
    from trl import DPOConfig, SFTConfig

    from hfnoise import DPConfig, DPDPOTrainer, DPSFTTrainer

    def make(trainer_class=DPSFTTrainer, dp=None, data=None, peft=True, model=None, eval=None, **settings):
        pairs = issubclass(trainer_class, DPDPOTrainer)
        arguments = {name: value for name, value in cpu_arguments.items() if pairs or name != "beta"} | settings
        adapter = peft if isinstance(peft, LoraConfig) else LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        return trainer_class(
            tiny_model_path if model is None else model,
            args=(DPOConfig if pairs else SFTConfig)(**arguments),
            eval_dataset=eval,
            train_dataset=data if data is not None else make_pairs(24) if pairs else make_texts(24),
            processing_class=tokenizer,
            peft_config=adapter if peft else None,
            dp_config=DPConfig(**{"noise_multiplier": 1.0, "unsafe_seed": 5} | (dp or {})),
        )

    return make


@pytest.fixture
def trained_weights():
    """Return a function that gives the trainable weights of a trainer as one vector."""
    import torch

    return lambda trainer: torch.cat(
        [value.detach().flatten() for value in trainer.model.parameters() if value.requires_grad]
    )
