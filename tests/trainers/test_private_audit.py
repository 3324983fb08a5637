"""The audit finds what is broken on purpose, and does not accuse what is right."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from hfnoise import DPConfig, DPDPOTrainer, DPSFTTrainer, dp_audit, make_canaries
from hfnoise.trainers import private_step
from hfnoise.trainers.private_report import privacy_report
from tests.conftest import WORDS

SIGMA = 4.0  # epsilon 1.4 for two steps on all rows; an eighth of it is 15


@pytest.fixture
def audit(tiny_model_path, tokenizer, cpu_arguments, make_texts):
    """Return `run(noise_multiplier, canaries, dp, **settings of dp_audit)`: two steps on all rows, by default."""
    from trl import SFTConfig

    def run(noise_multiplier=SIGMA, canaries=100, dp=None, steps=2, **settings):
        def make(dataset):
            torch.manual_seed(1)
            arguments = {name: value for name, value in cpu_arguments.items() if name != "beta"} | {
                "optim": "sgd", "learning_rate": 1.0, "max_steps": steps, "lr_scheduler_type": "constant",
            }  # fmt: skip
            chosen = {"noise_multiplier": noise_multiplier, "clip_norm": 0.1, "expected_batch_size": len(dataset)}
            return DPSFTTrainer(
                tiny_model_path,
                args=SFTConfig(**arguments),
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=LoraConfig(r=8, target_modules="all-linear"),
                dp_config=DPConfig(**{**chosen, "micro_batch_size": 32, "unsafe_seed": 5, **(dp or {})}),
            )

        rows = make_canaries(WORDS, canaries, seed=1, tokens=10) if isinstance(canaries, int) else canaries
        return dp_audit(make, settings.pop("dataset", make_texts(16)), rows, **{"unsafe_seed": 0, **settings})

    return run


def noise_divided_by(number, monkeypatch):
    finish = private_step.PrivateStep.finish

    def weak(self, step):
        self._noise_multiplier /= number
        finish(self, step)
        self._noise_multiplier *= number

    monkeypatch.setattr(private_step.PrivateStep, "finish", weak)


@pytest.mark.slow
def test_noise_that_each_of_eight_processes_would_add(audit, monkeypatch, tmp_path):
    noise_divided_by(8, monkeypatch)
    result = audit(guesses=25)
    assert result.refuted and result.epsilon_lower_bound > result.claimed_epsilon + 0.5
    assert result.auroc > 0.9 and result.verdict.startswith("REFUTED") and "noise missing" in result.verdict
    assert result.trainer.audit_result == result.to_dict()
    report = privacy_report(result.trainer)
    assert report["audit"]["epsilon_lower_bound"] == result.epsilon_lower_bound and json.dumps(report)
    result.plot(tmp_path / "plots" / "audit.png")
    assert (tmp_path / "plots" / "audit.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("noise_multiplier", [SIGMA, 1.0])
def test_a_right_run_is_not_refuted(noise_multiplier, audit):
    result = audit(noise_multiplier, canaries=200)
    assert not result.refuted and result.epsilon_lower_bound <= result.claimed_epsilon
    assert result.auroc > (0.55 if noise_multiplier == SIGMA else 0.75)
    assert result.verdict.startswith("not refuted" if noise_multiplier == SIGMA else "NOT REFUTED, and it could not")


@pytest.mark.slow
def test_without_noise_nearly_all_that_could_be_found_is_found(audit):
    result = audit(0.0, canaries=200)
    assert result.claimed_epsilon == math.inf and not result.refuted
    assert result.epsilon_lower_bound > 3.0 and result.auroc > 0.99 and result.epsilon_ceiling < 4


@pytest.mark.slow
def test_clipping_that_is_not_applied(audit, monkeypatch):
    clip = private_step.clip_per_unit
    monkeypatch.setattr(
        private_step, "clip_per_unit", lambda gradients, norm, *rest, **options: clip(gradients, 1e6, *rest, **options)
    )
    result = audit(canaries=200)
    assert result.refuted and result.epsilon_lower_bound > 2


@pytest.mark.slow
@pytest.mark.parametrize("dp", [{"grad_mode": "loop", "micro_batch_size": None}, {"clipping": "per_layer"}])
def test_other_ways_to_the_gradients(dp, audit, monkeypatch):
    noise_divided_by(8, monkeypatch)
    assert audit(dp=dp, guesses=25).refuted


@pytest.mark.slow
def test_black_box(audit):
    """From the losses alone, without noise and after many steps, members are found; with noise they are not."""
    leaky = audit(0.0, canaries=60, dp={"clip_norm": 5.0}, steps=8, score="loss")
    private = audit(8.0, canaries=60, dp={"clip_norm": 0.1}, steps=8, score="loss")
    assert leaky.auroc > 0.75 > private.auroc and leaky.score == "loss"


@pytest.mark.slow
def test_pairs(make_pairs, tiny_model_path, tokenizer, cpu_arguments):
    from trl import DPOConfig

    def make(dataset):
        torch.manual_seed(1)
        return DPDPOTrainer(
            tiny_model_path,
            args=DPOConfig(**cpu_arguments | {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1}),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, target_modules="all-linear"),
            dp_config=DPConfig(
                noise_multiplier=0.3, clip_norm=0.1, expected_batch_size=len(dataset), micro_batch_size=16,
                unsafe_seed=5,
            ),
        )  # fmt: skip

    canaries = make_canaries(WORDS, 60, seed=1, tokens=5, kind="pairs")
    result = dp_audit(make, make_pairs(16), canaries, unsafe_seed=0)
    assert result.auroc > 0.9 and result.epsilon_lower_bound < result.claimed_epsilon


@pytest.mark.slow
def test_canaries_of_several_rows(audit, make_texts, monkeypatch):
    """With unit_column a canary is all rows of one user, in or out together."""
    noise_divided_by(8, monkeypatch)
    rows = make_canaries(WORDS, 120, seed=1, tokens=10).add_column("user", [f"canary {i // 2}" for i in range(120)])
    dataset = make_texts(16, user=[f"user {i // 4}" for i in range(16)])
    dp = {"unit_column": "user", "max_rows_per_unit": 2, "expected_batch_size": 4, "noise_multiplier": 1.0}
    result = audit(canaries=rows, dataset=dataset, dp=dp)
    assert result.estimate.canaries == 60 == result.included.numel()
    units = result.trainer._units.count
    assert units == 4 + int(result.included.sum())
    with pytest.raises(ValueError, match=r"share values of unit_column='user' with the dataset \(\['canary 0'"):
        audit(canaries=rows, dataset=dataset.map(lambda row: {"user": "canary 0"}), dp=dp)


def test_coins_are_fair_secret_and_not_those_of_torch():
    from hfnoise.trainers.private_audit import _coins

    assert abs(int(_coins(10_000, 3).sum()) - 5000) < 200
    torch.manual_seed(0)
    first = _coins(64, None)
    torch.manual_seed(0)
    assert not torch.equal(first, _coins(64, None))


def test_the_run_is_charged_to_the_dataset_without_canaries(tmp_path, make_texts, make_private_trainer, monkeypatch):
    from hfnoise.trainers import private_audit

    monkeypatch.setattr("hfnoise.trainers.private_dataset.HF_HOME", str(tmp_path))
    monkeypatch.setattr(private_audit, "dataset_fingerprint", lambda dataset: "a" * 32)
    trainer = make_private_trainer()
    trainer.dp_config.unsafe_seed = None
    private_audit._charge_to(trainer, make_texts(24))
    assert trainer.fingerprint == "a" * 32
    assert trainer._ledger_file == tmp_path / "hfnoise" / "privacy" / ("a" * 16) / "ledger.json"


def test_canaries(tokenizer):
    texts = make_canaries(WORDS, 50, seed=0, tokens=6)["text"]
    assert len(set(texts)) == 50 and {len(text.split()) for text in texts} == {6}
    assert texts == make_canaries(WORDS, 50, seed=0, tokens=6)["text"]
    assert texts != make_canaries(WORDS, 50, seed=1, tokens=6)["text"]
    pairs = make_canaries(WORDS, 5, kind="pairs")
    assert pairs.column_names == ["prompt", "chosen", "rejected"] and pairs[0]["chosen"].startswith(" ")
    assert make_canaries(WORDS, 2, column="line").column_names == ["line"]
    with pytest.raises(ValueError, match="gives only 2 different strings of 1 tokens, 3 are needed"):
        make_canaries(["a", "b"], 3, tokens=1)
    with pytest.raises(ValueError, match="kind must be 'text' or 'pairs'"):
        make_canaries(WORDS, 3, kind="images")
    with pytest.raises(ValueError, match="m must be a whole number of at least 1, got 0"):
        make_canaries(WORDS, 0)
    with pytest.raises(ValueError, match="give a list of words instead"):
        make_canaries(tokenizer, 3)


def test_canaries_of_a_tokenizer():
    from transformers import AutoTokenizer

    from hfnoise.worlds.docstrings import model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    texts = make_canaries(tokenizer, 20, tokens=8)["text"]
    assert len(set(texts)) == 20 and not any("\ufffd" in text or "<|" in text for text in texts)


def test_refusals(audit, make_texts):
    with pytest.raises(TypeError, match="canaries must be a datasets.Dataset, got list"):
        audit(canaries=[{"text": "a"}])
    with pytest.raises(ValueError, match=r"canaries have the columns \['line'\], the dataset \['text'\]"):
        audit(canaries=make_canaries(WORDS, 10, column="line"))
    with pytest.raises(ValueError, match="score must be 'gradient'"):
        audit(score="activations")
    with pytest.raises(ValueError, match=r"delta=2.*in \(0, 1\)"):
        audit(delta=2.0)
    with pytest.raises(ValueError, match="make_trainer must return a private Trainer, got Trainer"):
        from transformers import Trainer

        dp_audit(lambda dataset: object.__new__(Trainer), make_texts(16), make_canaries(WORDS, 10))
    with pytest.raises(ValueError, match="rows of 26: dropped rows"):
        dp_audit(lambda dataset: Dropping(dataset), make_texts(16), make_canaries(WORDS, 10))


class Dropping:
    """A private Trainer that filters its rows."""

    _is_private = True

    def __init__(self, dataset: Dataset) -> None:
        self.train_dataset = dataset.select(range(3))
