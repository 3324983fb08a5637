"""Bad input: an error at construction that says what was given, what is allowed and what to do."""

import math
import os

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, RobustDPOConfig, RobustDPOTrainer
from tests.trainers.poisoned_reference import poisoned

CPU = {"output_dir": "unused", "use_cpu": True, "bf16": False}


@pytest.mark.parametrize("flip_rate", [-0.1, 0.5, 0.9, math.nan, "high", True])
@pytest.mark.parametrize("config_class", [NoiseDPOConfig, RobustDPOConfig])
def test_flip_rate_out_of_range(config_class, flip_rate):
    with pytest.raises(ValueError, match=r"flip_rate must be .*\[0, 0.5\)"):
        config_class(**CPU, loss_type="robust", flip_rate=flip_rate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "rdpo"}, "unknown loss 'rdpo'.*robust.*forward_corrected.*register_pair_loss"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_type": ["sym", "sigmoid"], "loss_weights": [1.0]}, "same length"),
        ({"loss_type": ["sym"], "loss_weights": [math.nan]}, "loss_weights must be a list of finite numbers"),
        ({"loss_type": "robust", "flip_rate": 0.2, "label_smoothing": 0.3}, "two names of one quantity"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.3}, "would be ignored by loss_type"),
        ({"loss_type": "robust"}, "needs a flip rate"),
        ({"loss_type": "cdpo"}, "needs a flip rate"),
        (
            {"loss_type": "ipo", "sample_weight_column": "weight"},
            r"\['ipo'\] cannot be weighted .*sample_weight",
        ),
        ({"loss_type": "sym", "ld_alpha": 0.5}, "ld_alpha=0.5 cannot be combined"),
        ({"loss_type": "sym", "use_weighting": True}, "use_weighting=True cannot be combined"),
        ({"loss_type": "sym", "f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl' cannot"),
        ({"loss_type": "holder", "holder_gamma": 0.0}, "holder_gamma must be"),
        ({"loss_type": "sym", "on_nan_log_probs": "ignore"}, "on_nan_log_probs must be 'raise' or 'skip'"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NoiseDPOConfig(**CPU, **settings)


def test_auto_needs_a_loss_without_a_rate():
    with pytest.raises(ValueError, match="needs a flip rate"):
        RobustDPOConfig(**CPU, loss_type="robust")
    with pytest.raises(ValueError, match="number in .* or 'auto', got None"):
        RobustDPOConfig(**CPU, flip_rate=None)


def test_strings_of_the_command_line_are_converted():
    assert RobustDPOConfig(**CPU, flip_rate="0.2").flip_rate == 0.2
    assert RobustDPOConfig(**CPU, flip_rate="AUTO").flip_rate == "auto"
    assert RobustDPOConfig(**CPU, label_smoothing=0.2).flip_rate == 0.2


def test_stock_configuration_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"replace DPOConfig\(...\) by NoiseDPOConfig\(...\)"):
        make_trainer(NoiseDPOTrainer, DPOConfig)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: pairs.select([]), "train_dataset is empty"),
        (lambda pairs: pairs.remove_columns("rejected"), r"lacks the columns \['rejected'\]"),
        (lambda pairs: pairs.remove_columns("rate"), "lacks the column 'rate' that flip_rate_column names"),
        (lambda pairs: with_values(pairs, "rate", {3: 0.6}), r"1 do not: row 3: 0.6"),
        (lambda pairs: with_values(pairs, "rate", {5: None, 7: -1.0}), "2 do not: row 5: None, row 7: -1.0"),
        (lambda pairs: with_values(pairs, "weight", {0: math.inf}), "weight.*row 0: inf"),
        (lambda pairs: with_values(pairs, "chosen", {2: pairs[2]["rejected"]}), r"identical answers.*\(rows 2\)"),
        (lambda pairs: with_values(pairs, "prompt", {4: "fox " * 40}), r"prompt that fills max_length=32.*\(rows 4\)"),
        (
            lambda pairs: with_values(
                pairs, "prompt", {1: "fox " * 30}, chosen={1: " a a old"}, rejected={1: " a a dog"}
            ),
            r"identical answers \(up to max_length=32\) \(rows 1\)",
        ),
    ],
)
def test_datasets(make_trainer, make_pairs, change, message):
    pairs = change(make_pairs(8, rate=[0.1] * 8, weight=[1.0] * 8))
    with pytest.raises(ValueError, match=message):
        make_trainer(
            NoiseDPOTrainer, NoiseDPOConfig, pairs, loss_type="robust", flip_rate_column="rate",
            sample_weight_column="weight",
        )  # fmt: skip


def with_values(pairs, column, values, **others):
    rows = pairs.to_dict()
    for name, changes in {column: values, **others}.items():
        for row, value in changes.items():
            rows[name][row] = value
    return Dataset.from_dict(rows)


def test_invalid_pairs_can_be_dropped(make_trainer, make_pairs, caplog):
    pairs = with_values(make_pairs(8), "prompt", {4: "fox " * 40}, chosen={2: " a dog"}, rejected={2: " a dog"})
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, loss_type="sym", drop_invalid_pairs=True)
    assert list(trainer.train_dataset["hfnoise_pair_index"]) == [0, 1, 3, 5, 6, 7]
    assert "rows 4): dropped" in caplog.text and "rows 2): dropped" in caplog.text


def test_eval_dataset_is_checked_too(make_trainer, make_pairs):
    with pytest.raises(ValueError, match="eval_dataset lacks the column 'rate'"):
        make_trainer(
            NoiseDPOTrainer, NoiseDPOConfig, make_pairs(8, rate=[0.1] * 8), make_pairs(4), loss_type="robust",
            flip_rate_column="rate",
        )  # fmt: skip
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, loss_type="sym")
    with pytest.raises(ValueError, match="eval_dataset is empty"):
        trainer.evaluate(make_pairs(4).select([]))


def test_unwritable_output_dir(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir .* cannot be written"):
        make_trainer(NoiseDPOTrainer, NoiseDPOConfig, loss_type="sym", output_dir=str(tmp_path / "file" / "run"))


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_engines_are_refused_by_name(make_trainer, monkeypatch, variable, cpu_arguments):
    config = NoiseDPOConfig(**cpu_arguments, loss_type="sym")  # before the launcher's variable is there
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="NoiseDPOTrainer does not run under (FSDP|DeepSpeed)"):
        make_trainer(NoiseDPOTrainer, lambda **kwargs: config)


def test_nan_names_the_pair_and_saves_nothing(make_trainer):
    trainer = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, loss_type="sym", precompute_ref_log_probs=True, max_steps=4,
        save_strategy="steps", save_steps=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"not finite for 1 preference pair\(s\), rows \[5\].*='skip'"):
        poisoned(trainer, 5).train()
    assert not os.path.isdir(trainer.args.output_dir) or not os.listdir(trainer.args.output_dir)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nan_step_can_be_skipped(make_trainer, accumulation, caplog):
    settings = {
        "loss_type": "sym", "precompute_ref_log_probs": True, "max_steps": 4, "on_nan_log_probs": "skip",
        "per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    trainer = poisoned(make_trainer(NoiseDPOTrainer, NoiseDPOConfig, **settings), 5)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.state.global_step == 4
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    skipped = [entry for entry in trainer.state.log_history if "noise/skipped_steps" in entry]
    assert len(skipped) == 1 and "rows [5]" in caplog.text
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())


def test_skipped_step_leaves_the_weights_alone(make_trainer):
    trainer = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, loss_type="sym", precompute_ref_log_probs=True, max_steps=1,
        on_nan_log_probs="skip", weight_decay=0.1,
    )  # fmt: skip
    for row in range(16):
        poisoned(trainer, row)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.fixture
def saved_run(make_trainer):
    settings = {"loss_type": "robust", "flip_rate": 0.2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig, **settings)
    trainer.train()
    return trainer.args.output_dir, settings


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt"])
def test_damaged_checkpoint(make_trainer, saved_run, name, caplog):
    output_dir, settings = saved_run
    path = os.path.join(output_dir, "checkpoint-4", name)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig, **settings)
    with pytest.raises(ValueError, match=f"{name.replace('.', '[.]')} is (missing or )?damaged"):
        trainer.train(resume_from_checkpoint=os.path.join(output_dir, "checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)  # falls back to the newest one that is whole, and says so
    assert trainer.state.global_step == 4 and "skipping a checkpoint that is not whole" in caplog.text


def test_foreign_checkpoint(make_trainer, saved_run, tmp_path):
    output_dir, settings = saved_run
    checkpoint = os.path.join(output_dir, "checkpoint-4")
    other_rate = make_trainer(RobustDPOTrainer, RobustDPOConfig, **settings | {"flip_rate": 0.3})
    with pytest.raises(ValueError, match="another run .*flip_rate: 0.2 there, 0.3 here"):
        other_rate.train(resume_from_checkpoint=checkpoint)
    other_option = make_trainer(RobustDPOTrainer, RobustDPOConfig, **settings | {"robust_rescale": True})
    with pytest.raises(ValueError, match="another run .*robust_rescale: False there, True here"):
        other_option.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer(RobustDPOTrainer, RobustDPOConfig, **settings | {"output_dir": str(tmp_path / "empty")}).train(
            resume_from_checkpoint=True
        )
