"""A private search: the law of its trials, one mechanism, only the winner left, one entry on the ledger."""

import json
import math

import pytest
import torch

from hfnoise import dp_tune
from hfnoise.privacy.accounting import Mechanism, Search, composed_epsilon
from hfnoise.privacy.calibration import calibrate_noise_multiplier
from hfnoise.privacy.ledger import Ledger, LedgerEntry
from hfnoise.privacy.trial_counts import trial_count
from hfnoise.privacy.tuning import calibrate_search_noise, tuned_epsilon
from hfnoise.trainers.private_report import privacy_report

RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
SEED_OF_THREE, SEED_OF_ONE = 12, 1  # numbers of trials at expected_trials=3, eta=1; tested below


@pytest.fixture
def tune(make_private_trainer, tmp_path):
    """Return `run(score, space, dp, **settings of dp_tune)` and the list of trainers it built."""
    built = []

    def run(score=lambda trainer: -trainer.args.learning_rate, space=None, dp=None, make=None, **settings):
        def build(candidate):
            chosen = {"max_steps": 1} | candidate
            folder = tmp_path / f"run-{chosen.get('learning_rate', 0)}"
            built.append(make_private_trainer(dp=dp, output_dir=str(folder), **chosen))
            return built[-1]

        space = {"learning_rate": RATES} if space is None else space
        options = {"expected_trials": 3, "eta": 1.0, "unsafe_seed": SEED_OF_THREE} | settings
        return dp_tune(make or build, space, score, **options), built

    return run


def test_only_the_winner_is_left(tune, tmp_path, capsys):
    ledger_file = tmp_path / "ledger.json"
    result, built = tune(dp={"ledger_file": str(ledger_file)})
    capsys.readouterr()
    assert len(built) == 3
    rates = [trainer.args.learning_rate for trainer in built]
    assert result.candidate == {"learning_rate": min(rates)} and result.score == -min(rates)
    assert len(set(rates)) > 1 and result.trainer.args.learning_rate == min(rates)
    assert result.trainer.state.global_step == 1
    # Nothing was written but the ledger, and there the search is one entry.
    assert {path.name for path in tmp_path.iterdir()} <= {"ledger.json", "ledger.json.lock"}
    entries = Ledger(ledger_file, result.trainer.fingerprint).entries()
    assert [(entry.expected_trials, entry.eta, entry.steps) for entry in entries] == [(3.0, 1.0, 1)]
    expected = tuned_epsilon(1.0, 4 / 24, 1, 1e-5, expected_trials=3, eta=1.0)
    assert result.epsilon == result.total_epsilon == expected > result.run_epsilon
    assert result.trainer.epsilon() == expected
    report = privacy_report(result.trainer)
    assert report["epsilon"] == expected == report["total_epsilon"] and report["tuning"]["run_epsilon"] < expected
    result.trainer.save_model()
    saved = json.loads((tmp_path / f"run-{min(rates)}" / "dp_report.json").read_text())
    assert saved["epsilon"] == expected
    with pytest.raises(ValueError, match="won a dp_tune search"):  # more steps would not be in its epsilon
        result.trainer.train()


def test_runs_print_and_report_nothing(tune, capsys):
    tune(unsafe_seed=SEED_OF_ONE)
    assert "grad_norm" not in capsys.readouterr().out


def test_numbers_of_trials_follow_the_law(monkeypatch):
    from hfnoise.trainers import private_tuning

    drawn = []

    class Counting(private_tuning._Hunt):
        def run(self, candidate, folder):
            drawn[-1] += 1

        def result(self, nothing):
            return None

    monkeypatch.setattr(private_tuning, "_Hunt", Counting)
    for seed in range(400):
        drawn.append(0)
        dp_tune(None, {"x": [1]}, None, expected_trials=3, eta=1.0, unsafe_seed=seed)
    assert drawn[SEED_OF_THREE] == 3 and drawn[SEED_OF_ONE] == 1
    law = trial_count(3, 1.0)
    assert abs(sum(drawn) / 400 - 3) < 4 * math.sqrt(6 / 400)  # a geometric law of mean 3 has variance 6
    for k in (1, 2, 3):
        share = law.pmf(k)
        assert abs(drawn.count(k) / 400 - share) < 4 * math.sqrt(share / 400)


def test_equal_scores_are_drawn_for(tune):
    from hfnoise.privacy.keyed_random import KeyedRandom
    from hfnoise.trainers.private_tuning import _Hunt

    kept = []
    for seed in range(300):
        hunt = _Hunt(None, None, None, KeyedRandom(seed.to_bytes(32, "big")))
        for name in "abc":
            hunt._keep(1.0, name, None, None)
        hunt._keep(-math.inf, "d", None, None)
        kept.append(hunt._best[1])
    assert all(abs(kept.count(name) - 100) < 40 for name in "abc")


@pytest.mark.slow
def test_a_run_that_broke_loses(tune):
    scores = iter([math.nan, 0.0, 1.0])
    result, built = tune(lambda trainer: next(scores))
    assert result.score == 1.0 and result.trainer is built[2]
    with pytest.raises(RuntimeError, match="no candidate gave a finite score"):
        tune(lambda trainer: math.nan, unsafe_seed=SEED_OF_ONE)


@pytest.mark.slow
def test_weights_that_became_infinite_lose(tune):
    result, built = tune(lambda trainer: 0.0, {"learning_rate": [1e38, 1e-3], "optim": ["sgd"]})
    assert result.candidate["learning_rate"] == 1e-3
    assert 1e38 in [trainer.args.learning_rate for trainer in built]


def test_candidates_of_other_mechanisms(tune):
    with pytest.raises(ValueError, match=r"different mechanisms \(planned_steps: . and .; now \{'max_steps': ."):
        tune(space={"max_steps": [1, 2]})


@pytest.mark.slow
def test_a_budget_is_that_of_the_search(tune, tmp_path):
    ledger_file = tmp_path / "ledger.json"
    dp = {"noise_multiplier": None, "target_epsilon": 3.0, "ledger_file": str(ledger_file)}
    result, built = tune(dp=dp, unsafe_seed=SEED_OF_ONE, eta=-0.5)
    assert 2.9 < result.epsilon <= 3.0 and result.run_epsilon < 2.5
    assert {trainer.dp_config.noise_multiplier for trainer in built} == {built[0].noise_multiplier}
    with pytest.raises(ValueError, match="no noise multiplier up to 1e.06 keeps a search with expected_trials=3"):
        tune(dp=dp, unsafe_seed=SEED_OF_ONE)


@pytest.mark.slow
def test_a_poisson_number_of_trials_may_be_none(tune, tmp_path):
    ledger_file = tmp_path / "ledger.json"
    seed = next(seed for seed in range(100) if _poisson_trials(seed) == 0)
    result, built = tune(
        distribution="poisson", expected_trials=1, unsafe_seed=seed, dp={"ledger_file": str(ledger_file)}
    )
    assert result.candidate is None and result.trainer is None and result.epsilon > 0
    assert len(Ledger(ledger_file, built[0].fingerprint).entries()) == 1  # what is not there would tell


def _poisson_trials(seed):
    from hfnoise.privacy.keyed_random import KeyedRandom
    from hfnoise.privacy.secret_file import run_key, unsafe_secret

    uniform = KeyedRandom(run_key(unsafe_secret(seed), "search")).uniforms("number of trials", 0, 1)
    return trial_count(1, 0.0, "poisson").sample(float(uniform))


def test_refusals(tune, make_private_trainer, make_trainer):
    from hfnoise import RobustDPOConfig, RobustDPOTrainer

    with pytest.raises(ValueError, match="must return a private Trainer, got RobustDPOTrainer"):
        tune(make=lambda candidate: make_trainer(RobustDPOTrainer, RobustDPOConfig, flip_rate=0.1))
    with pytest.raises(ValueError, match=r"space must be a dict .* got \{\}"):
        tune(space={})
    with pytest.raises(ValueError, match=r"space\['optim'\] is 'sgd'; give a list"):
        tune(space={"optim": "sgd"})
    with pytest.raises(ValueError, match="expected_trials must be a finite number, at least 1; got 0.5"):
        tune(expected_trials=0.5)
    with pytest.raises(ValueError, match="log_private_metrics=True shows losses of every candidate"):
        tune(dp={"log_private_metrics": True})
    with pytest.raises(ValueError, match="noise_multiplier=0 gives no run a guarantee"):
        tune(dp={"noise_multiplier": 0.0})
    for name, value in {"push_to_hub": True, "load_best_model_at_end": True}.items():
        trainer = make_private_trainer()
        setattr(trainer.args, name, value)
        with pytest.raises(ValueError, match=name):
            tune(make=lambda candidate, trainer=trainer: trainer)


def test_hyperparameter_search_is_refused(make_private_trainer):
    with pytest.raises(ValueError, match="Use hfnoise.dp_tune"):
        make_private_trainer().hyperparameter_search()


def test_candidates_are_independent_and_uniform():
    from random import Random

    from hfnoise.trainers.private_tuning import _draw

    draws = Random(0)
    drawn = [_draw({"a": [1, 2, 3, 4], "b": lambda random: random.uniform(-4, -2)}, draws) for _ in range(2000)]
    counts = torch.tensor([one["a"] for one in drawn]).bincount()[1:]
    assert (counts - 500).abs().max() < 80
    assert abs(sum(one["b"] for one in drawn) / 2000 + 3) < 0.06


def test_searches_and_runs_in_one_ledger(tmp_path):
    """A search has no loss distribution: beside other runs each of n searches is taken at delta / 2n."""
    delta, run = 1e-5, Mechanism(0.05, 3.0, 300)
    search = Search(Mechanism(0.05, 3.0, 300), 10, -0.5)
    alone = composed_epsilon([search], delta)
    assert alone == search.epsilon(delta) == tuned_epsilon(3.0, 0.05, 300, delta, 10, -0.5) > 1.159
    both = composed_epsilon([run, search], delta)
    assert both == pytest.approx(composed_epsilon([run], delta / 2) + search.epsilon(delta / 2))
    assert composed_epsilon([search, search], delta) == pytest.approx(2 * search.epsilon(delta / 2))
    ledger = Ledger(tmp_path / "ledger.json", "data")
    entry = LedgerEntry("search", 0.05, 3.0, 300, expected_trials=10.0, eta=-0.5, distribution="negative_binomial")
    ledger.charge(entry)
    ledger.charge(LedgerEntry("run", 0.05, 3.0, 300))
    assert Ledger(tmp_path / "ledger.json", "data").mechanisms() == [search, run]
    assert ledger.epsilon(delta) == both
    # A run that is calibrated to what a search left stays inside, by the same rule.
    noise = calibrate_noise_multiplier(4.0, delta, 0.05, 300, spent=(search,))
    assert 3.9 < composed_epsilon([search, Mechanism(0.05, noise, 300)], delta) <= 4.0
    with pytest.raises(ValueError, match="is spent: the searches on these units"):
        calibrate_noise_multiplier(1.0, delta, 0.05, 300, spent=(search,))


def test_noise_of_a_search():
    search = Search(Mechanism(0.05, 1.0, 300), 10, -0.5)
    noise = calibrate_search_noise(3.0, 1e-5, search)
    assert (
        tuned_epsilon(noise, 0.05, 300, 1e-5, 10, -0.5)
        <= 3.0
        < tuned_epsilon(noise / 1.004, 0.05, 300, 1e-5, 10, -0.5)
    )
