"""Dr. DPO: the gradient of the global batch for every split of it, neutral limits, refusals, resume."""

import math

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames
from trl import DPOConfig, DPOTrainer

from hfnoise import DrDPOConfig, DrDPOTrainer
from hfnoise.preference import dr_dpo_value, pair_loss
from hfnoise.preference.batch_log_sum import BatchLogSum

PAIRS = 16
SPLITS = [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)]
# Sums of 16 pairs in another order differ in the last bits of float32.
TOLERANCE = 2e-6


class KeepGradients(TrainerCallback):
    """Keeps what the optimizer is about to be given."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        self.gradients.append(torch.cat(grads).clone())


@pytest.fixture
def step(make_trainer, make_pairs, losses_of):
    """Return a function that makes one step on 16 pairs; it returns gradient, logged loss and trainer."""

    def run(size, accumulation, pairs=None, **settings):
        keeper = KeepGradients()
        trainer = make_trainer(
            DrDPOTrainer, DrDPOConfig, make_pairs(PAIRS) if pairs is None else pairs, callbacks=[keeper],
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1,
            max_grad_norm=settings.pop("max_grad_norm", 0.0), **settings,
        )  # fmt: skip
        trainer.train()
        return keeper.gradients[0], losses_of(trainer)[0], trainer

    return run


def one_shot(make_trainer, pairs, dr_beta, base="sigmoid", weights=None, **settings):
    """Return gradient and value of Dr. DPO on all pairs at once, straight from the formula."""
    trainer = make_trainer(DrDPOTrainer, DrDPOConfig, pairs, per_device_train_batch_size=PAIRS, max_steps=1)
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs, columns = trainer.split_columns(batch)
    reference = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs)
    chosen, rejected = trainer._policy_log_probs(inputs).sum(1).chunk(2)
    margins = trainer.beta * (chosen - rejected - (reference[0] - reference[1]))
    losses = pair_loss(base, margins, **settings)
    value = dr_dpo_value(losses, dr_beta)
    value.backward()
    grads = [parameter.grad.flatten() for parameter in trainer.model.parameters() if parameter.grad is not None]
    return torch.cat(grads), value.item()


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def started(tiny_model_path, tmp_path_factory):
    """Return the tiny model moved away from its reference, so that losses differ between pairs."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("started")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_trainer(started, tiny_model_path, tokenizer, cpu_arguments, make_pairs):
    """As the shared fixture, but the policy has already left the reference."""
    from transformers import AutoModelForCausalLM

    def make(trainer_class, config_class, pairs=None, eval_pairs=None, peft_config=None, callbacks=None, **settings):
        return trainer_class(
            AutoModelForCausalLM.from_pretrained(started),
            None if peft_config else AutoModelForCausalLM.from_pretrained(tiny_model_path),
            args=config_class(**cpu_arguments | settings),
            train_dataset=make_pairs(PAIRS) if pairs is None else pairs,
            eval_dataset=eval_pairs,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return make


@pytest.mark.parametrize("dr_beta", [0.05, *(pytest.param(beta, marks=pytest.mark.slow) for beta in (0.2, 1.0))])
def test_every_split_has_the_gradient_of_the_whole_batch(step, make_trainer, make_pairs, dr_beta):
    expected, value = one_shot(make_trainer, make_pairs(PAIRS), dr_beta)
    for size, accumulation in SPLITS:
        gradient, loss, trainer = step(size, accumulation, dr_beta=dr_beta)
        assert trainer.dr_mechanism == "deferred"
        assert relative_error(gradient, expected) <= TOLERANCE, (size, accumulation)
        assert loss == pytest.approx(value, rel=1e-5)


def test_the_official_scope_depends_on_the_split(step, make_trainer, make_pairs):
    expected, _ = one_shot(make_trainer, make_pairs(PAIRS), 0.2)
    whole, _, _ = step(16, 1, dr_beta=0.2, dr_scope="micro_batch")
    split, _, _ = step(2, 8, dr_beta=0.2, dr_scope="micro_batch")
    assert relative_error(whole, expected) <= TOLERANCE
    assert relative_error(split, expected) > 0.1


@pytest.mark.parametrize("size", [16, 2])
def test_two_passes_agree_with_one(step, size, monkeypatch):
    settings = {"dr_beta": 0.2, "loss_weights": None}
    deferred, loss, _ = step(size, PAIRS // size, **settings)
    monkeypatch.setattr(DrDPOTrainer, "_choose_mechanism", lambda self: "two_pass")
    two_pass, two_pass_loss, _ = step(size, PAIRS // size, **settings)
    assert relative_error(two_pass, deferred) <= TOLERANCE
    assert two_pass_loss == pytest.approx(loss, rel=1e-5)


def test_a_second_loss_beside_it_takes_two_passes(step):
    settings = {"loss_type": ["dr_sigmoid", "sft"], "loss_weights": [1.0, 0.1], "dr_beta": 0.2}
    whole, loss, trainer = step(16, 1, **settings)
    split, split_loss, _ = step(4, 4, **settings)
    alone, alone_loss, _ = step(16, 1, dr_beta=0.2)
    assert trainer.dr_mechanism == "two_pass"
    # TRL's sft is a mean over tokens of a micro-batch, which is not the same for every split: wider.
    assert relative_error(split, whole) <= 0.05 and relative_error(alone, whole) > 0.005
    assert loss > alone_loss and split_loss == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize("settings", [{"prefix_sharing": True}, {"activation_checkpointing": True}])
def test_every_forward_pass_has_the_same_gradient(step, settings):
    plain, _, _ = step(4, 4, dr_beta=0.5)
    other, _, _ = step(4, 4, dr_beta=0.5, **settings)
    assert relative_error(other, plain) <= TOLERANCE


def in_processes(step, expected, value, settings):
    for size, accumulation in [(8, 1), (4, 2), (2, 4), (1, 8)]:
        gradient, loss, trainer = step(size, accumulation, **settings)
        assert trainer.accelerator.num_processes == 2
        assert relative_error(gradient, expected) <= TOLERANCE, (size, accumulation)
        assert loss == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("dr_beta", [0.05, pytest.param(1.0, marks=pytest.mark.slow)])
def test_two_processes_have_the_gradient_of_the_whole_batch(step, make_trainer, make_pairs, two_processes, dr_beta):
    expected, value = one_shot(make_trainer, make_pairs(PAIRS), dr_beta)
    two_processes(in_processes, step, expected, value, {"dr_beta": dr_beta})


def two_passes_in_processes(step, expected, value, settings):
    DrDPOTrainer._choose_mechanism = lambda self: "two_pass"  # in the forked process only
    in_processes(step, expected, value, settings)


@pytest.mark.slow
def test_two_passes_in_two_processes(step, make_trainer, make_pairs, two_processes):
    expected, value = one_shot(make_trainer, make_pairs(PAIRS), 0.2)
    two_processes(two_passes_in_processes, step, expected, value, {"dr_beta": 0.2})


def test_large_dr_beta_is_dpo(make_trainer, losses_of):
    ours = make_trainer(DrDPOTrainer, DrDPOConfig, dr_beta=1e6)
    stock = make_trainer(DPOTrainer, DPOConfig)
    for trainer in (ours, stock):
        trainer.train()
    assert losses_of(ours) == pytest.approx(losses_of(stock), rel=1e-4)
    for name, tensor in stock.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_clipping_sees_the_final_gradient(step):
    free, _, _ = step(4, 4, dr_beta=0.5)
    clipped, _, trainer = step(4, 4, dr_beta=0.5, max_grad_norm=free.norm().item() / 2)
    torch.testing.assert_close(clipped, free / 2, rtol=1e-4, atol=1e-7)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert norms[0] == pytest.approx(free.norm().item(), rel=1e-5)


def test_short_last_step(make_trainer, make_pairs, losses_of):
    # 14 pairs: the second step of the epoch has one micro-batch of 4 and one of 2.
    runs = []
    for size, accumulation in [(8, 1), (4, 2)]:
        trainer = make_trainer(
            DrDPOTrainer, DrDPOConfig, make_pairs(14), per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, max_steps=2, dr_beta=0.3,
        )  # fmt: skip
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_lora_and_weights_and_another_base_loss(step, make_pairs):
    pairs = make_pairs(PAIRS, weight=[0.0, 0.5, 1.5, 2.0] * 4)
    settings = {
        "pairs": pairs, "sample_weight_column": "weight", "loss_type": "dr_robust", "flip_rate": 0.2,
        "peft_config": LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "dr_beta": 0.5,
    }  # fmt: skip
    whole, loss, _ = step(16, 1, **settings)
    split, split_loss, _ = step(1, 16, **settings)  # micro-batches whose one pair weighs 0
    assert relative_error(split, whole) <= TOLERANCE
    assert split_loss == pytest.approx(loss, rel=1e-5)


def test_offset_keeps_small_temperatures_finite(step):
    # Losses over dr_beta reach hundreds: exp of them without a shared offset is 0 for every pair.
    gradient, loss, trainer = step(2, 8, dr_beta=0.012, beta=50.0)
    whole, whole_loss, _ = step(16, 1, dr_beta=0.012, beta=50.0)
    assert gradient.isfinite().all() and gradient.norm() > 0
    assert relative_error(gradient, whole) <= 1e-4  # float32 margins of 50 have an error of 1e-6, 1e-4 after / 0.012
    assert loss == pytest.approx(whole_loss, rel=1e-4, abs=1e-5)


def test_evaluation_logs_the_plain_mean_and_the_log_mean_exp(make_trainer, make_pairs):
    trainer = make_trainer(DrDPOTrainer, DrDPOConfig, eval_pairs=make_pairs(10, seed=5), dr_beta=0.3)
    metrics = trainer.evaluate()
    margins = trainer.pair_margins(make_pairs(10, seed=5))
    losses = pair_loss("sigmoid", margins)
    assert metrics["eval_dr_loss"] == pytest.approx(dr_dpo_value(losses, 0.3).item(), rel=1e-5)
    sizes = [4, 4, 2]  # the Trainer averages the means of batches, repeated for every row
    assert math.isclose(metrics["eval_loss"], sum(part.mean().item() * len(part) for part in losses.split(sizes)) / 10,
                        rel_tol=1e-5)  # fmt: skip


def test_effective_fraction_is_logged(step):
    _, _, trainer = step(4, 4, dr_beta=0.05)
    (logged,) = [entry for entry in trainer.state.log_history if "noise/effective_fraction" in entry]
    assert 1 / PAIRS <= logged["noise/effective_fraction"] < 0.99


def test_skipped_step_leaves_nothing_behind(make_trainer):
    from tests.trainers.poisoned_reference import poisoned

    trainer = make_trainer(
        DrDPOTrainer, DrDPOConfig, on_nan_log_probs="skip", precompute_ref_log_probs=True, max_steps=4,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    poisoned(trainer, 5).train()
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    assert sum(entry.get("noise/skipped_steps", 0) for entry in trainer.state.log_history) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dr_beta": 0.0}, "dr_beta must be a finite number of at least 0.01145"),
        ({"dr_beta": -1.0}, "dr_beta must be a finite number"),
        ({"dr_beta": 1e-3}, "no weight left in float32"),
        ({"dr_beta": math.nan}, "dr_beta must be a finite number"),
        ({"dr_beta": "much"}, "dr_beta must be a finite number"),
        ({"dr_scope": "local"}, "dr_scope must be 'global' or 'micro_batch'"),
        ({"loss_type": "sigmoid"}, "exactly one of dr_sigmoid"),
        ({"loss_type": ["dr_sigmoid", "dr_sym"]}, "exactly one of"),
        ({"loss_type": "dr_unknown"}, "unknown loss 'dr_unknown'"),
        ({"loss_type": "dr_robust"}, "needs a flip rate"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"per_device_train_batch_size": 1}, "Dr. DPO over one pair is plain DPO"),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "dr_scope": "micro_batch"},
         "set dr_scope='global'"),
        ({"dr_scope": "micro_batch", "sample_weight_column": "w"}, "needs dr_scope='global'"),
    ],
)  # fmt: skip
def test_bad_settings_raise_at_construction(cpu_arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        DrDPOConfig(**cpu_arguments | settings)


def test_dropout_in_two_passes_is_refused(make_trainer):
    with pytest.raises(ValueError, match="dropout"):
        make_trainer(
            DrDPOTrainer, DrDPOConfig, loss_type=["dr_sigmoid", "sft"], disable_dropout=False,
            peft_config=LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]),
        )  # fmt: skip


def test_resume_is_exact_and_refuses_another_dr_beta(make_trainer):
    settings = {"dr_beta": 0.3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
                "gradient_accumulation_steps": 2}  # fmt: skip
    whole = make_trainer(DrDPOTrainer, DrDPOConfig, **settings)
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    resumed = make_trainer(DrDPOTrainer, DrDPOConfig, **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    other = make_trainer(DrDPOTrainer, DrDPOConfig, **settings | {"dr_beta": 0.4})
    with pytest.raises(ValueError, match=r"dr_beta: 0.3 there, 0.4 here"):
        other.train(resume_from_checkpoint=checkpoint)


def test_pairs_of_weight_zero_set_no_offset():
    log_sum = BatchLogSum()
    nothing = torch.full((2,), -math.inf)
    assert log_sum.add(nothing, torch.zeros(2)) == 1.0 and log_sum.total == 0
    assert log_sum.add(torch.tensor([-500.0, -501.0])) == 1.0
    assert log_sum.offset == -500.0 and log_sum.total == pytest.approx(1 + math.exp(-1))


def test_first_micro_batch_of_weight_zero(step, make_pairs):
    settings = {"sample_weight_column": "weight", "dr_beta": 0.012, "beta": 2.0}
    pairs = make_pairs(PAIRS, weight=[0.0] * 13 + [1.0] * 3)
    gradient, _, _ = step(1, 16, pairs=pairs, **settings)
    whole, _, _ = step(16, 1, pairs=pairs, **settings)
    assert gradient.isfinite().all() and relative_error(gradient, whole) <= 1e-4


def test_what_a_broken_off_step_left_is_not_scaled(make_trainer, make_pairs):
    # 6 rows by 2 x 2: the Trainer does not finish the last step of a stream's epoch.
    gradients = {}
    for epochs in ("one", "two"):
        keeper = KeepGradients()
        trainer = make_trainer(
            DrDPOTrainer, DrDPOConfig, make_pairs(6).to_iterable_dataset(), callbacks=[keeper], learning_rate=0.0,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2 if epochs == "two" else 1,
            max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        gradients[epochs] = keeper.gradients[-1].norm().item()
    assert gradients["two"] == pytest.approx(gradients["one"], rel=0.5)


def test_optimizers_that_step_in_the_backward_take_two_passes(make_trainer):
    trainer = make_trainer(DrDPOTrainer, DrDPOConfig)
    assert trainer.dr_mechanism == "deferred"
    for name in (OptimizerNames.GALORE_ADAMW_LAYERWISE, OptimizerNames.LOMO):
        trainer.args.optim = name
        assert trainer._choose_mechanism() == "two_pass"
    trainer.model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        trainer._choose_mechanism()
