"""Private steps: every way to compute one gives the same weights, and each part of the mechanism does what it says."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from hfnoise import DPConfig, DPDPOTrainer, DPSFTTrainer, make_private
from hfnoise.privacy import compute_epsilon
from hfnoise.privacy.budget import privacy_budget

# Sums in another order: the last bits of float32, through three steps of Adam with lr 0.01.
ROUNDING = {"rtol": 0, "atol": 2e-5}


def run(trainer):
    trainer.train()
    return trainer


@pytest.mark.parametrize("trainer_class", [DPSFTTrainer, DPDPOTrainer])
def test_leaves_equal_the_loop_over_units(trainer_class, make_private_trainer, trained_weights):
    leaf = run(make_private_trainer(trainer_class))
    loop = run(make_private_trainer(trainer_class, {"grad_mode": "loop"}))
    torch.testing.assert_close(trained_weights(leaf), trained_weights(loop), **ROUNDING)
    start = trained_weights(make_private_trainer(trainer_class))
    assert (trained_weights(leaf) - start).norm() > 0.1


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.slow), False])
def test_checkpointing_changes_nothing(reentrant, make_private_trainer, trained_weights):
    plain = run(make_private_trainer())
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert torch.equal(trained_weights(plain), trained_weights(run(make_private_trainer(**settings))))


@pytest.mark.parametrize(
    "clipping",
    ["flat", pytest.param("auto", marks=pytest.mark.slow), pytest.param("per_layer", marks=pytest.mark.slow)],
)
def test_split_into_micro_batches(clipping, make_private_trainer, trained_weights):
    dp = {"clipping": clipping, "accumulation_dtype": "float64", "clip_norm": 0.3, "expected_batch_size": 8}
    large = run(make_private_trainer(dp=dp | {"micro_batch_size": 8}, per_device_train_batch_size=8))
    small = run(make_private_trainer(dp=dp | {"micro_batch_size": 3}))
    torch.testing.assert_close(trained_weights(large), trained_weights(small), **ROUNDING)


@pytest.mark.slow
def test_batch_of_pasted_arguments(make_private_trainer, trained_weights):
    trainer = make_private_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert trainer.expected_batch_size == 6 and trainer.args.gradient_accumulation_steps == 1
    assert trainer.args.max_grad_norm == 0.0 and trainer.sample_rate == 0.25 and trainer.steps_per_epoch == 4
    trainer.args.max_steps, trainer.args.num_train_epochs, trainer.expected_batch_size = -1, 1.3, 7
    budget = privacy_budget(24, 7, 1.3, noise_multiplier=100.0, accountant="rdp")
    assert trainer.planned_steps() == budget.steps == 6


def test_without_noise_and_clipping_it_is_gradient_descent_on_the_mean(
    make_private_trainer, make_pairs, trained_weights
):
    """q = 1, sigma = 0 and a large C: the stock step on the whole dataset."""
    dp = {"noise_multiplier": 0.0, "clip_norm": 1e6, "expected_batch_size": 8}
    settings = {"data": make_pairs(8), "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    private = run(make_private_trainer(DPDPOTrainer, dp, **settings))
    stock = make_private_trainer(DPDPOTrainer, dp, **settings, per_device_train_batch_size=8)
    stock._is_private = False
    stock.train()
    torch.testing.assert_close(trained_weights(private), trained_weights(stock), rtol=0, atol=1e-6)
    assert private.epsilon() == float("inf")


def test_the_sum_of_a_step_by_hand(make_private_trainer, trained_weights):
    """One step of SGD is lr / B times (clipped sum + noise): the noise is that of the key, once, and B is constant."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "lr_scheduler_type": "constant"}
    dp = {"clip_norm": 0.1, "expected_batch_size": 6}
    with_noise = make_private_trainer(dp=dp, **settings)
    start = trained_weights(with_noise)
    run(with_noise)
    without = run(make_private_trainer(dp=dp | {"noise_multiplier": 0.0}, **settings))
    noise = with_noise.private_run.random.normals("noise", 0, start.numel())
    expected = trained_weights(without).double() - 0.1 * noise / 6
    torch.testing.assert_close(trained_weights(with_noise).double(), expected, rtol=0, atol=1e-7)
    assert (trained_weights(without) - start).norm() * 6 <= 0.1 * 24  # at most C for each unit


def test_an_empty_batch_adds_noise(make_private_trainer, trained_weights):
    # One unit in 1000 steps: the draws of this seed leave the first three batches empty.
    dp = {"expected_batch_size": 1}
    trainer = make_private_trainer(dp=dp, per_device_train_batch_size=1, optim="sgd", learning_rate=1.0, max_steps=6)
    counts = []
    step = type(trainer)._add_micro_batch
    trainer._add_micro_batch = lambda model, micro: (
        counts.append(int(micro.counts.sum())) or step(trainer, model, micro)
    )
    start = trained_weights(trainer)
    run(trainer)
    assert 0 in counts and (trained_weights(trainer) - start).norm() > 1.0


def test_a_unit_of_nan_is_left_out(make_private_trainer, trained_weights, monkeypatch):
    """As if its gradient were 0; the other units and the step stand."""
    dp = {"noise_multiplier": 0.0, "expected_batch_size": 24, "micro_batch_size": 4}
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1}
    poisoned, without = make_private_trainer(dp=dp, **settings), make_private_trainer(dp=dp, **settings)
    add = type(poisoned)._add_micro_batch
    seen = {"count": 0}

    def with_nan(model, micro):
        seen["count"] += 1
        if seen["count"] == 2:
            layer = poisoned.model.get_input_embeddings()
            hook = layer.register_forward_hook(
                lambda module, args, output: torch.cat([output[:1] * torch.nan, output[1:]])
            )
            try:
                return add(poisoned, model, micro)
            finally:
                hook.remove()
        return add(poisoned, model, micro)

    def left_out(model, micro):
        seen["count"] += 1
        if seen["count"] == 2:
            micro.counts[0] = False
        return add(without, model, micro)

    poisoned._add_micro_batch = with_nan
    run(poisoned)
    seen["count"], without._add_micro_batch = 0, left_out
    run(without)
    assert torch.isfinite(trained_weights(poisoned)).all()
    assert torch.equal(trained_weights(poisoned), trained_weights(without))


def test_private_numbers_are_not_logged(make_private_trainer):
    trainer = make_private_trainer(DPDPOTrainer)
    output = trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert "grad_norm" in names and "learning_rate" in names
    assert not any("loss" in name or "rewards" in name or "accurac" in name or "tokens" in name for name in names)
    assert output.training_loss != output.training_loss and "train_loss" not in output.metrics
    open_trainer = make_private_trainer(DPDPOTrainer, {"log_private_metrics": True})
    open_trainer.train()
    assert {"loss", "rewards/margins"} <= {name for entry in open_trainer.state.log_history for name in entry}


def test_units_of_several_rows(make_private_trainer, make_texts, trained_weights):
    """A user's gradient is clipped as one; rows beyond the cap rest, another choice at each step."""
    data = make_texts(24, user=["ann", "bob", "cy"] * 8)
    dp = {"unit_column": "user", "max_rows_per_unit": 3, "clip_norm": 0.2, "expected_batch_size": 2}
    dp |= {"noise_multiplier": 0.0, "micro_batch_size": 2}
    settings = {"data": data, "optim": "sgd", "learning_rate": 1.0, "max_steps": 4, "lr_scheduler_type": "constant"}
    leaf = make_private_trainer(dp=dp, **settings)
    assert leaf._units.count == 3
    start = trained_weights(leaf)
    run(leaf)
    loop = run(make_private_trainer(dp=dp | {"grad_mode": "loop", "micro_batch_size": None}, **settings))
    torch.testing.assert_close(trained_weights(leaf), trained_weights(loop), rtol=0, atol=1e-6)
    assert (trained_weights(leaf) - start).norm() <= 4 * 3 * 0.2 / 2


def test_make_private_of_a_built_trainer(make_trainer, make_private_trainer, make_pairs, trained_weights):
    from trl import DPOConfig, DPOTrainer

    class Mine(DPOTrainer):
        pass

    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    built = make_trainer(Mine, DPOConfig, make_pairs(24), peft_config=adapter)
    trainer = make_private(built, DPConfig(noise_multiplier=1.0, unsafe_seed=5))
    assert trainer is built and isinstance(trainer, Mine) and isinstance(trainer, Trainer)
    made = make_private_trainer(DPDPOTrainer, peft=adapter)
    assert torch.equal(trained_weights(run(trainer)), trained_weights(run(made)))


def test_make_private_refuses_and_leaves_the_trainer_alone(make_trainer):
    from trl import DPOConfig, DPOTrainer

    trainer = make_trainer(DPOTrainer, DPOConfig, loss_type=["aot"])
    with pytest.raises(ValueError, match="sorts margins over the batch"):
        make_private(trainer, DPConfig(target_epsilon=3))
    assert type(trainer) is DPOTrainer and not hasattr(trainer, "dp_config")
    trainer.train()
    with pytest.raises(ValueError, match="has trained 3 steps without privacy"):
        make_private(trainer, DPConfig(target_epsilon=3))


@pytest.mark.slow
def test_a_second_training_goes_on_from_the_first(make_private_trainer, tmp_path):
    """Its weights hold the steps of both."""
    dp = {"unsafe_seed": None, "secret_file": str(tmp_path / "secret"), "accountant": "rdp"}
    trainer = make_private_trainer(dp=dp, max_steps=2)
    trainer.train()
    once = trainer.epsilon()
    trainer.train()
    assert once == compute_epsilon(1.0, 1 / 6, 2, 1e-5, "rdp")
    assert trainer.epsilon() == compute_epsilon(1.0, 1 / 6, 4, 1e-5, "rdp")
    report = trainer.privacy_report()
    assert report["epsilon"] == trainer.epsilon() and report["steps_of_an_earlier_run"] == 2


@pytest.mark.slow
def test_what_is_left_behind_is_checked_and_nothing_else(make_private_trainer, tiny_model_path):
    """TRL's frozen copy of a given adapter is not the trained one; a warm-up may have moved nothing yet."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = run(make_private_trainer(DPDPOTrainer, model=model, peft=False, max_steps=1))
    assert list(trainer.model.peft_config) == ["default", "ref"]
    run(make_private_trainer(max_steps=1, warmup_steps=5))
    stuck = make_private_trainer(max_steps=1)
    stuck.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(RuntimeError, match="the optimizer does not hold the trainable parameters"):
        run(stuck)


def test_no_step_beyond_the_budget(make_private_trainer):
    trainer = make_private_trainer()
    trainer.private_run.limit = 2
    trainer._start_run = lambda checkpoint: None
    trainer.callback_handler.callbacks = []  # the one that stops before is gone
    with pytest.raises(RuntimeError, match="step 3 exceeds the budget"):
        trainer.train()
