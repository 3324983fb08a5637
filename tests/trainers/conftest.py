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
