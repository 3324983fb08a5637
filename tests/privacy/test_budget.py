"""`hfnoise dp-budget`: its numbers are those of the accounting, and its errors one line."""

import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest

from hfnoise.__main__ import main
from hfnoise.privacy.accounting import Mechanism, composed_epsilon
from hfnoise.privacy.budget import default_delta, privacy_budget, render

WANTED = dict(target_epsilon=0.5, delta=1e-5, parameters=400, clip_norm=0.5)


@pytest.fixture(scope="module")
def budget():
    # Without sampling all of it takes a tenth of a second.
    return privacy_budget(500, 500, 3, **WANTED)


def test_numbers_agree_with_the_accounting(budget):
    assert (budget.steps, budget.sample_rate, budget.delta) == (3, 1.0, 1e-5)
    assert budget.epsilon == composed_epsilon([Mechanism(1.0, budget.noise_multiplier, 3)], 1e-5)
    assert 0.49 < budget.epsilon <= 0.5


def test_noise_to_signal(budget):
    assert budget.noise_per_coordinate == pytest.approx(budget.noise_multiplier * 0.5 / 500)
    assert budget.noise_norm == pytest.approx(20 * budget.noise_per_coordinate)
    assert budget.noise_to_signal == pytest.approx(budget.noise_norm / 0.5)


@pytest.mark.slow
def test_plans_cost_what_they_say():
    budget = privacy_budget(1000, 500, 1.5, **WANTED)
    assert [plan.epochs for plan in budget.by_epochs] == [1, 1.5, 2, 3]
    assert [plan.steps for plan in budget.by_epochs] == [2, 3, 4, 6]
    assert (budget.doubled_batch.batch, budget.doubled_batch.steps) == (1000, 2)
    for plan in [*budget.by_epochs, budget.doubled_batch]:
        rate = plan.batch / 1000
        here = composed_epsilon([Mechanism(rate, budget.noise_multiplier, plan.steps)], 1e-5)
        assert here <= plan.epsilon + 1e-12 and plan.epsilon == pytest.approx(here, rel=5e-3)
        needed = composed_epsilon([Mechanism(rate, plan.noise_multiplier, plan.steps)], 1e-5)
        assert 0.48 < needed <= 0.5
        assert plan.noise_per_coordinate == pytest.approx(plan.noise_multiplier * 0.5 / plan.batch)
    # Twice the batch: less noise in the average, though the multiplier is larger.
    assert budget.doubled_batch.noise_multiplier > budget.noise_multiplier
    assert budget.doubled_batch.noise_per_coordinate < budget.noise_per_coordinate


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(3, 6), (1, 2), (0.5, 1), (1.2, 3)],  # an epoch is ceil(1000 / 900) = 2 steps
)
def test_steps_are_those_of_the_trainer(epochs, steps):
    """ceil(epochs * ceil(N / B)), as in `DPTrainerMixin.planned_steps`."""
    assert privacy_budget(1000, 900, epochs, noise_multiplier=200.0, accountant="rdp").steps == steps


def test_epsilon_of_a_given_noise():
    budget = privacy_budget(1000, 1000, 1, noise_multiplier=20.0, accountant="rdp")
    assert budget.epsilon == composed_epsilon([Mechanism(1.0, 20.0, 1)], 1e-5, "rdp")
    assert budget.doubled_batch is None  # there are no more examples
    assert budget.noise_per_coordinate is None and budget.noise_to_signal is None


@pytest.mark.parametrize(("examples", "delta"), [(10, 1e-5), (10_000, 1e-5), (50_000, 2e-6)])
def test_default_delta(examples, delta):
    assert default_delta(examples) == pytest.approx(delta)


def test_many_epochs_are_thinned():
    budget = privacy_budget(100, 100, 100, noise_multiplier=200.0, accountant="rdp")
    epochs = [plan.epochs for plan in budget.by_epochs]
    assert 100 in epochs and epochs[-1] > 180 and len(epochs) <= 13


def test_table(budget):
    shown = render(budget)
    assert "noise multiplier for epsilon 0.5 " in shown
    assert f"noise multiplier      {budget.noise_multiplier:.4f}" in shown
    assert "What doubling the batch buys" not in shown  # there are no more examples
    assert "dp-accounting 0." in shown


@pytest.mark.slow
def test_table_of_a_larger_batch():
    budget = privacy_budget(1000, 500, 1, **WANTED)
    less = 1 - budget.doubled_batch.noise_per_coordinate / budget.noise_per_coordinate
    assert f"What doubling the batch buys: {less:.0%} less noise in each averaged gradient" in render(budget)


WHOLE_BATCHES = dict(noise_multiplier=20.0, accountant="rdp", parameters=400, clip_norm=0.5)


@pytest.mark.parametrize("as_json", [False, True])
def test_command_line(as_json, capsys):
    arguments = "--examples 1000 --batch 1000 --epochs 2 --noise_multiplier 20 --accountant rdp"
    arguments += " --parameters 400 --clip_norm 0.5" + " --json" * as_json
    assert main(["dp-budget", *arguments.split()]) == 0
    shown = capsys.readouterr().out
    budget = privacy_budget(1000, 1000, 2, **WHOLE_BATCHES)
    if as_json:
        assert json.loads(shown) == json.loads(json.dumps(asdict(budget)))
    else:
        assert shown == f"{render(budget)}\n"


def test_json_has_no_infinity(capsys):
    arguments = "--noise_multiplier 1e-6 --examples 10 --batch 10 --epochs 1 --json"
    assert main(["dp-budget", *arguments.split()]) == 0
    text = capsys.readouterr().out
    assert "Infinity" not in text and json.loads(text)["epsilon"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--examples 10 --batch 5 --epochs 1", "one of the arguments --target_epsilon --noise_multiplier is required"),
        ("--target_epsilon 1 --batch 5 --epochs 1", "required: --examples"),
        ("--target_epsilon 1 --noise_multiplier 1 --examples 10 --batch 5 --epochs 1", "not allowed with"),
        ("--target_epsilon 1 --examples 10 --batch 20 --epochs 1", "batch=20 is larger than examples=10"),
        ("--target_epsilon 1 --examples 10 --batch 0 --epochs 1", "batch=0 must be an integer of at least 1"),
        ("--target_epsilon 1 --examples 10 --batch 5 --epochs 0", "epochs=0.0 must be above 0"),
        ("--target_epsilon 1 --examples 10 --batch 5 --epochs nan", "epochs=nan must be above 0"),
        ("--target_epsilon -1 --examples 10 --batch 5 --epochs 1", "target_epsilon=-1.0 is no privacy budget"),
        ("--target_epsilon 1 --examples 10 --batch 5 --epochs 1 --delta 2", "delta=2.0"),
        ("--target_epsilon 1 --examples 10 --batch 5 --epochs 1 --accountant gdp", "invalid choice: 'gdp'"),
        ("--target_epsilon 1 --examples 10 --batch 5 --epochs 1 --clip_norm -1", "clip_norm=-1.0 must be above 0"),
        ("--target_epsilon 1 --examples x --batch 5 --epochs 1", "invalid int value: 'x'"),
        ("--noise_multiplier 0 --examples 10 --batch 5 --epochs 1", "no epsilon holds"),
        ("--target_epsilon 1 --examples 10 --batch 5 --epochs 1 --epoch 2", "unrecognized arguments"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, capsys):
    assert main(["dp-budget", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("hfnoise dp-budget: error: ") and message in err and "see hfnoise dp-budget --help" in err


def test_one_of_epsilon_and_noise():
    with pytest.raises(ValueError, match="exactly one"):
        privacy_budget(10, 5, 1)
    with pytest.raises(ValueError, match="exactly one"):
        privacy_budget(10, 5, 1, target_epsilon=1.0, noise_multiplier=1.0)


def test_noise_too_small_to_account_for():
    assert privacy_budget(10, 10, 1, noise_multiplier=1e-6).epsilon == math.inf


def test_help_imports_nothing_heavy():
    code = "import sys; from hfnoise.__main__ import main; assert main(['dp-budget', '--help']) == 0; "
    code += "print([name for name in ('torch', 'numpy', 'dp_accounting', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--target_epsilon" in done.stdout and done.stdout.splitlines()[-1] == "[]"
