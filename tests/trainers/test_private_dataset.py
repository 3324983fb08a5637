"""Which dataset a run is charged to: the one that was given, through whichever door."""

import pytest
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from hfnoise import DPConfig, DPDPOTrainer, make_private
from hfnoise.privacy.hf_fingerprint import dataset_fingerprint
from hfnoise.trainers import private_dataset
from hfnoise.trainers.private_dataset import given_train_dataset, privacy_folder


class Passes(DPOTrainer):
    """A subclass that passes its arguments on, as most do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("trainer_class", [DPOTrainer, Passes])
def test_by_name_and_by_place(trainer_class):
    after = trainer_class.__mro__
    assert given_train_dataset(after, (), {"train_dataset": ["row"]}) == ["row"]
    # model, ref_model, args, data_collator, train_dataset
    assert given_train_dataset(after, ("model", None, None, None, ["row"]), {"eval_dataset": 1}) == ["row"]
    assert given_train_dataset(after, ("model",), {}) is None


def test_every_door_leads_to_one_budget(make_trainer, make_pairs, tiny_model_path, tokenizer, cpu_arguments, tmp_path):
    rows, adapter = make_pairs(16), LoraConfig(r=2, target_modules=["q_proj"])
    expected = dataset_fingerprint(rows)
    config = DPConfig(noise_multiplier=1.0, secret_file=str(tmp_path / "secret"))
    places = [tiny_model_path, None, DPOConfig(**cpu_arguments), None, rows]
    placed = DPDPOTrainer(*places, processing_class=tokenizer, peft_config=adapter, dp_config=config)
    assert placed.fingerprint == expected
    made = make_private(make_trainer(DPOTrainer, DPOConfig, rows, peft_config=adapter), config, dataset=rows)
    assert made.fingerprint == expected
    with pytest.raises(ValueError, match="dataset has 9 rows and the Trainer 16"):
        make_private(make_trainer(DPOTrainer, DPOConfig, rows, peft_config=adapter), config, dataset=make_pairs(9))


def test_without_the_dataset_there_is_a_warning(make_trainer, make_pairs, caplog, tmp_path):
    rows, adapter = make_pairs(16), LoraConfig(r=2, target_modules=["q_proj"])
    config = DPConfig(noise_multiplier=1.0, secret_file=str(tmp_path / "secret"))
    made = make_private(make_trainer(DPOTrainer, DPOConfig, rows, peft_config=adapter), config)
    assert made.fingerprint == dataset_fingerprint(made.train_dataset) != dataset_fingerprint(rows)
    assert "the ledger knows this dataset by the rows after tokenising" in caplog.text


def test_the_folder_of_a_dataset(tmp_path, monkeypatch):
    """Its name is one on every system; that of earlier versions goes on to be used, with the ledger in it."""
    monkeypatch.setattr(private_dataset, "HF_HOME", str(tmp_path))
    fingerprint = "sha256:" + "0123456789abcdef" * 4
    root = tmp_path / "hfnoise" / "privacy"
    assert privacy_folder(fingerprint) == root / "0123456789abcdef"
    (root / "sha256:012345678").mkdir(parents=True)
    assert privacy_folder(fingerprint) == root / "sha256:012345678"
    (root / "0123456789abcdef").mkdir()
    assert privacy_folder(fingerprint) == root / "0123456789abcdef"
