"""A Trainer without network: refused before training, or saved and told how to push; no test here needs a Hub."""

import pytest
from peft import LoraConfig

from hfnoise import RobustDPOConfig, RobustDPOTrainer
from hfnoise.errors import PushError


def test_refused_before_training(make_trainer, tmp_path):
    with pytest.raises(PushError, match="Nothing was trained.*Unset HF_HUB_OFFLINE and push again: start it") as found:
        make_trainer(RobustDPOTrainer, RobustDPOConfig, push_to_hub=True, hub_model_id="me/model", hub_revision="v2")
    assert f"`hf upload me/model {tmp_path / 'run'} . --revision v2 --exclude '_*'" in str(found.value)
    assert isinstance(found.value, OSError) and found.value.__cause__ is not None


def test_saved_when_the_push_breaks(make_trainer, tmp_path):
    trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.train()
    with pytest.raises(PushError, match="Model and card are saved in .*call push_to_hub.. again, or run `hf upload"):
        trainer.push_to_hub(private=True)
    saved = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= saved
    # About this disk, and no word of the Hub.
    (tmp_path / "file").write_text("")
    trainer.args.output_dir, trainer.hub_model_id = str(tmp_path / "file"), "me/model"
    with pytest.raises(OSError) as found:
        trainer.push_to_hub()
    assert not isinstance(found.value, PushError)
