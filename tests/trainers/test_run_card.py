"""README.md is ours after every way in which a Trainer writes: PEFT, TRL and transformers write cards of their own."""

import json
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from hfnoise import RobustDPOConfig, RobustDPOTrainer

LORA = {"r": 2, "target_modules": ["q_proj"]}


def method_of(folder):
    """Return the method that the card of a folder names; a card of somebody else names none."""
    card = ModelCard.load(Path(folder) / "README.md")
    assert "More Information Needed" not in card.text and "## How it was made" in card.text
    return card.data.to_dict()["hfnoise"]["method"]


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_every_way_to_save_a_preference_model(make_trainer, adapter, tmp_path):
    peft_config = adapter and LoraConfig(**adapter)
    trainer = make_trainer(
        RobustDPOTrainer, RobustDPOConfig, peft_config=peft_config, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert method_of(folder) == method_of(folder / "checkpoint-1") == "robust-dpo"
    trainer.save_model(str(tmp_path / "other"))
    assert method_of(tmp_path / "other") == "robust-dpo"
    trainer.create_model_card(dataset_name="me/pairs", license="mit")
    trainer.save_model()  # what was given once stays
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets == ["me/pairs"] and card.data.license == "mit"
    # PEFT looks for a card that is there already, and adds to it.
    trainer.model.save_pretrained(folder)
    assert method_of(folder) == "robust-dpo" and "robust-dpo" in ModelCard.load(folder / "README.md").data.tags
    with pytest.raises(TypeError, match="no argument 'dataset_nmae'; it takes .*dataset_name"):
        trainer.create_model_card(dataset_nmae="me/pairs")


def test_a_card_that_cannot_be_written_costs_no_checkpoint(make_trainer, caplog, monkeypatch):
    monkeypatch.setattr(RobustDPOTrainer, "run_card", lambda self, **given: 1 / 0)
    trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (Path(trainer.args.output_dir) / "checkpoint-2" / "model.safetensors").is_file()
    assert "could not be written: division by zero" in caplog.text
    with pytest.raises(ZeroDivisionError):  # asked for by name it is an error
        trainer.create_model_card()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_every_way_to_save_a_quantised_model(tiny_model_path, tokenizer, make_texts, cpu_arguments, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    from hfnoise import QATSFTConfig, QATSFTTrainer, QuestConfig

    arguments = {name: value for name, value in cpu_arguments.items() if name != "beta"}
    arguments |= {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, quantization_config=QuestConfig(weight_bits=4))
    trainer = QATSFTTrainer(
        model, args=QATSFTConfig(**arguments), train_dataset=make_texts(8), processing_class=tokenizer,
        peft_config=adapter and LoraConfig(**adapter),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    forms = [
        ModelCard.load(one / "README.md").data.to_dict()["hfnoise"]["form"]
        for one in (folder, folder / "checkpoint-1")
    ]
    assert forms == (["adapter", "adapter"] if adapter else ["packed", "master"])
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert ("AutoPeftModelForCausalLM" in text) is bool(adapter) and "bits of a weight | 4" in text


PUSH = """
    import json, os
    import torch
    from datasets import load_from_disk
    from huggingface_hub import hf_hub_download
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    import hfnoise
    from hfnoise import QATSFTConfig, QATSFTTrainer, QuestConfig
    from tests.trainers.noise_prompt_world import new_net
    from tests.trainers.one_more_step_world import new_module, new_step_trainer

    torch.set_num_threads(1)
    hfnoise.AdaptiveGuidance(threshold=0.97, inner=hfnoise.ProjectedGuidance()).push_to_hub("guider")
    new_net().push_to_hub("net")
    new_module().push_to_hub("module")
    settings = json.loads(os.environ["SETTINGS"]) | {
        "push_to_hub": True, "hub_strategy": "every_save", "max_steps": 1, "save_strategy": "steps", "save_steps": 1,
    }
    pushes = dict(push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=1, max_steps=1)
    texts = load_from_disk(os.environ["TEXTS"])
    trainers = {
        "steps": new_step_trainer("steps", **pushes),
        "qat": QATSFTTrainer(
            AutoModelForCausalLM.from_pretrained(os.environ["MODEL"], quantization_config=QuestConfig(weight_bits=4)),
            processing_class=AutoTokenizer.from_pretrained(os.environ["MODEL"]), train_dataset=texts,
            args=QATSFTConfig(**settings | {"output_dir": "qat"}),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        ),
    }
    for name, trainer in trainers.items():
        trainer.train()
        trainer._finish_current_push()
        # What stands there before the last push.
        with open(hf_hub_download("tester/" + name, "README.md"), encoding="utf-8") as file:
            assert "method: " in file.read(), name
        trainer.push_to_hub(tags=["mine"])
"""


@pytest.mark.hub
@pytest.mark.slow  # a fresh process that imports all libraries
def test_cards_on_the_hub(hub, run_python, tiny_model_path, make_texts, cpu_arguments, tmp_path):
    make_texts(8).save_to_disk(tmp_path / "texts")
    settings = {name: value for name, value in cpu_arguments.items() if name not in ("beta", "output_dir")}
    environment = {"MODEL": tiny_model_path, "TEXTS": str(tmp_path / "texts"), "SETTINGS": json.dumps(settings)}
    run_python(textwrap.dedent(PUSH), environment)
    expected = {"guider": "adaptive-guidance", "net": "golden-noise", "module": "one-more-step"}
    for name, method in (expected | {"steps": "one-more-step", "qat": "qat"}).items():
        card = ModelCard(hub.files(f"tester/{name}")["README.md"].decode())
        block = card.data.to_dict()["hfnoise"]
        assert block["method"] == method and "Information Needed" not in card.text and "None" not in card.text
        assert f'"tester/{name}"' in card.text
        if name == "guider":
            assert (
                block["options"]["AdaptiveGuidance"]["threshold"] == 0.97 and "ProjectedGuidance" in block["options"]
            )
        if name in ("steps", "qat"):
            assert "mine" in card.data.tags
    assert hub.unrouted == []
