"""What cannot be private is refused at construction, by name, with what to do."""

import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from hfnoise import DPConfig, DPDPOTrainer, DPSFTTrainer, dp_check, make_private


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "exactly one of target_epsilon and noise_multiplier must be given, got none"),
        ({"target_epsilon": 3, "noise_multiplier": 1}, "got target_epsilon and noise_multiplier"),
        ({"target_epsilon": 0}, "target_epsilon must be a number above 0, got 0"),
        ({"target_epsilon": "three"}, "target_epsilon must be a finite number or None, got 'three'"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be a number at least 0, got -1.0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be a finite number"),
        ({"target_epsilon": 3, "target_delta": 1.0}, "target_delta must be a number above 0 and below 1, got 1.0"),
        ({"target_epsilon": 3, "clip_norm": 0}, "clip_norm must be a number above 0, got 0"),
        ({"target_epsilon": 3, "expected_batch_size": 2.5}, "expected_batch_size must be a whole number"),
        ({"target_epsilon": 3, "clipping": "ghost"}, "clipping must be one of flat, auto, per_layer, got 'ghost'"),
        ({"target_epsilon": 3, "noise": "laplace"}, "noise must be one of gaussian, banded"),
        ({"target_epsilon": 3, "bands": 4}, "bands=4 is read by noise='banded' only"),
        ({"target_epsilon": 3, "max_rows_per_unit": 2}, "max_rows_per_unit=2 needs unit_column"),
        ({"target_epsilon": 3, "grad_mode": "loop", "micro_batch_size": 4}, "which takes one unit at a time"),
        ({"target_epsilon": 3, "unsafe_seed": 1, "secret_file": "x"}, "a seed is no secret"),
        ({"target_epsilon": 3, "noise": "banded", "adam_bias_correction": True}, "needs noise='gaussian'"),
    ],
)
def test_settings(settings, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        DPConfig(**settings)


def test_numbers_as_yaml_and_command_lines_bring_them():
    config = DPConfig(target_epsilon="3e0", clip_norm="0.1", expected_batch_size="8", noise="banded", bands="4")
    assert (config.target_epsilon, config.clip_norm, config.expected_batch_size, config.bands) == (3.0, 0.1, 8, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_grad_norm": 0.5}, "max_grad_norm=0.5 would clip the mean gradient after the noise"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True runs steps again"),
        ({"train_sampling_strategy": "group_by_length"}, "drawn independently"),
        ({"padding_free": True}, "padding_free=True puts several units into one row"),
        ({"packing": True}, "packing=True puts several units into one row"),
        ({"include_num_input_tokens_seen": "all"}, "the exact size of private batches"),
        ({"push_to_hub": True, "hub_strategy": "all_checkpoints"}, "would upload checkpoints"),
    ],
)
def test_training_arguments(arguments, words, make_private_trainer):
    if {"push_to_hub", "padding_free", "packing"} & set(arguments):  # without a Hub, a GPU and its attention
        from hfnoise.trainers.private_refusals import _refuse_arguments

        trainer = make_private_trainer()
        for name, value in arguments.items():
            setattr(trainer.args, name, value)
        with pytest.raises(ValueError, match=words):
            _refuse_arguments(trainer.args)
        return
    with pytest.raises(ValueError, match=words):
        make_private_trainer(**arguments)


def test_fp16(make_private_trainer):
    from hfnoise.trainers.private_refusals import _refuse_arguments

    trainer = make_private_trainer()
    trainer.args.fp16 = True  # transformers itself refuses it on a CPU
    with pytest.raises(ValueError, match="skips steps, depending on the private data"):
        _refuse_arguments(trainer.args)


@pytest.mark.parametrize("loss", [["aot"], ["aot_unpaired"], ["sigmoid", "sft"]])
def test_losses_over_the_batch(loss, make_private_trainer):
    with pytest.raises(ValueError, match="the loss of a unit then depends on the other rows"):
        make_private_trainer(DPDPOTrainer, loss_type=loss)


def test_trainers_over_the_batch(make_trainer):
    from hfnoise import DrDPOConfig, DrDPOTrainer

    trainer = make_trainer(DrDPOTrainer, DrDPOConfig, peft_config=LoraConfig(r=2))
    with pytest.raises(ValueError, match="DrDPOTrainer cannot be private: it weighs every pair"):
        make_private(trainer, DPConfig(target_epsilon=3, unsafe_seed=1))


def test_without_settings(make_private_trainer):
    with pytest.raises(ValueError, match=r"DPSFTTrainer needs dp_config"):
        DPSFTTrainer("model", train_dataset=None)


def test_more_than_all_units_and_a_weak_delta(make_private_trainer, caplog):
    with pytest.raises(ValueError, match="is more than the 24 units"):
        make_private_trainer(dp={"expected_batch_size": 25})
    make_private_trainer(dp={"target_delta": 0.1})
    assert "is not below 1 / units" in caplog.text


def test_an_unknown_unit_column(make_private_trainer):
    with pytest.raises(ValueError, match="unit_column='user' is not a column of train_dataset"):
        make_private_trainer(dp={"unit_column": "user"})


def test_a_secret_that_others_can_read(make_private_trainer, tmp_path):
    file = tmp_path / "secrets" / "key"
    dp = {"unsafe_seed": None, "secret_file": str(file)}
    make_private_trainer(dp=dp)
    assert file.stat().st_mode & 0o777 == 0o600
    os.chmod(file, 0o644)
    with pytest.raises(ValueError, match=r"can be read by others \(mode 0644\)"):
        make_private_trainer(dp=dp)
    with pytest.raises(ValueError, match="lies in output_dir"):
        make_private_trainer(dp=dp | {"secret_file": str(tmp_path / "run" / "key")})
    file.chmod(0o600)
    with pytest.raises(ValueError, match="what was released would be forgotten"):
        make_private_trainer(dp=dp | {"ledger_file": str(tmp_path / "run" / "ledger.json")})


def test_a_damaged_secret(make_private_trainer, tmp_path):
    file = tmp_path / "key"
    file.write_text("abc")
    file.chmod(0o600)
    with pytest.raises(ValueError, match="does not hold 64 hexadecimal digits"):
        make_private_trainer(dp={"unsafe_seed": None, "secret_file": str(file)})


def test_parameters_without_per_unit_gradients(make_private_trainer):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match='grad_mode="loop"'):
        make_private_trainer(peft=adapter)
    make_private_trainer(peft=adapter, dp={"grad_mode": "loop"}, max_steps=1).train()


def test_a_loss_over_the_batch_that_nobody_named(make_private_trainer, make_texts, tiny_model_path):
    """dp_check finds it: here the loss of a row is divided by the largest in the batch."""

    class Contrastive(DPSFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            losses = -model(**inputs, fused_lm_head=True).log_probs.sum(1)
            return (losses / losses.max().detach()).mean()

    with pytest.raises(ValueError, match="the gradient of a row in a batch differs from that of the row alone"):
        make_private_trainer(Contrastive).train()


@pytest.mark.parametrize("trainer_class", [DPSFTTrainer, DPDPOTrainer])
def test_what_the_check_finds(trainer_class, make_private_trainer, trained_weights):
    trainer = make_private_trainer(trainer_class)
    before = trained_weights(trainer).clone()
    state = torch.random.get_rng_state()
    result = dp_check(trainer)
    pairs = trainer_class is DPDPOTrainer
    assert (result.scale.reduction, result.scale.copies) == (("mean", 2) if pairs else ("sum", 1))
    assert result.error_alone < 1e-5 and result.error_sum < 1e-5 and len(result.covered) == 8
    assert torch.equal(before, trained_weights(trainer)) and torch.equal(state, torch.random.get_rng_state())
    assert all(value.grad is None for value in trainer.model.parameters())


def test_dp_check_of_a_stock_trainer(make_trainer):
    from trl import DPOConfig, DPOTrainer

    with pytest.raises(ValueError, match="dp_check needs a private Trainer"):
        dp_check(make_trainer(DPOTrainer, DPOConfig))


def test_streams(make_texts):
    from hfnoise.trainers.private_refusals import _refuse_data

    class Trainer:
        train_dataset = Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()

    with pytest.raises(ValueError, match="no length and no random access"):
        _refuse_data(Trainer)


def test_hyperparameter_search(make_private_trainer):
    with pytest.raises(ValueError, match="dp_tune"):
        make_private_trainer().hyperparameter_search()


@pytest.mark.parametrize("dp", [{"noise": "banded", "bands": 2}, {"adam_bias_correction": True}])
def test_optimizers(dp, make_private_trainer):
    with pytest.raises(ValueError, match="optim|adam_epsilon"):
        make_private_trainer(dp=dp)
