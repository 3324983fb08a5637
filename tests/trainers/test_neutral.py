"""Neutral settings: losses, gradients and final weights equal those of trl.DPOTrainer to the bit."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, RobustDPOConfig, RobustDPOTrainer

# TRL's settings -> ours that mean the same.
SETTINGS = {
    "sigmoid": ({}, {}),
    "forward_corrected at rate 0": ({}, {"loss_type": "forward_corrected", "flip_rate": 0.0}),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.2}, {"loss_type": "robust", "flip_rate": 0.2}),
    "label_smoothing": (
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"loss_type": "robust", "label_smoothing": 0.2},
    ),
    "mixture": (
        {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.5, 0.2, 0.1]},
        {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.5, 0.2, 0.1]},
    ),
    "ld_alpha": ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    "f-divergence": ({"f_divergence_type": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
    "use_weighting": ({"use_weighting": True}, {"use_weighting": True}),
}
RUNS = {
    "full": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "lora": {"peft": True},
    "lora precomputed": {"peft": True, "precompute_ref_log_probs": True},
}
# One of each kind stays in the default suite.
SLOW = {"label_smoothing", "f-divergence", "use_weighting", "precomputed", "checkpointing", "lora precomputed"}


def marked(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def trained(trainer_class, config_class, model_path, tokenizer, pairs, arguments):
    arguments = dict(arguments)
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if arguments.pop("peft", False) else None
    trainer = trainer_class(
        model_path,
        args=config_class(**arguments),
        train_dataset=pairs,
        eval_dataset=pairs.select(range(6)),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    evaluation = trainer.evaluate()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, evaluation["eval_loss"], trainer.model.state_dict()


def assert_same(stock, ours):
    assert stock[0] == ours[0]
    assert len(stock[0]) == 3 and len(set(stock[0])) == 3
    assert stock[1] == ours[1]
    assert all(torch.equal(tensor, ours[2][name]) for name, tensor in stock[2].items())


@pytest.mark.parametrize("settings", marked(SETTINGS))
def test_settings(tiny_model_path, tokenizer, make_pairs, cpu_arguments, settings):
    of_trl, of_ours = SETTINGS[settings]
    pairs = make_pairs(16)
    stock = trained(DPOTrainer, DPOConfig, tiny_model_path, tokenizer, pairs, cpu_arguments | of_trl)
    ours = trained(NoiseDPOTrainer, NoiseDPOConfig, tiny_model_path, tokenizer, pairs, cpu_arguments | of_ours)
    assert_same(stock, ours)


@pytest.mark.parametrize("run", marked(RUNS))
def test_ways_to_run(tiny_model_path, tokenizer, make_pairs, cpu_arguments, run):
    pairs = make_pairs(16)
    arguments = cpu_arguments | RUNS[run]
    stock = trained(DPOTrainer, DPOConfig, tiny_model_path, tokenizer, pairs, arguments)
    neutral = {"loss_type": "forward_corrected", "flip_rate": 0.0}
    ours = trained(RobustDPOTrainer, RobustDPOConfig, tiny_model_path, tokenizer, pairs, arguments | neutral)
    assert_same(stock, ours)


def test_the_stock_run_did_move(tiny_model_path, tokenizer, make_pairs, cpu_arguments):
    _, _, weights = trained(DPOTrainer, DPOConfig, tiny_model_path, tokenizer, make_pairs(16), cpu_arguments)
    before = AutoModelForCausalLM.from_pretrained(tiny_model_path).state_dict()
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.mlp.up_proj.weight"])
