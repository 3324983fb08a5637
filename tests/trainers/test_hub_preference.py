"""Training with push_to_hub: stock classes pull the weights to the bit, and the card there is ours."""

import json
import textwrap

import pytest
from huggingface_hub import ModelCard

pytestmark = [pytest.mark.hub, pytest.mark.slow]  # fresh processes that import all libraries

TRAIN = """
    import json, os, sys
    import torch
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from hfnoise import RobustDPOConfig, RobustDPOTrainer

    torch.set_num_threads(1)
    AutoModelForCausalLM.from_pretrained(os.environ["MODEL"]).push_to_hub("base")
    PreTrainedTokenizerFast.from_pretrained(os.environ["MODEL"]).push_to_hub("base")
    pairs = load_from_disk(os.environ["PAIRS"])
    sums = {}
    for name, peft_config in {"full": None, "adapter": LoraConfig(r=2, target_modules=["q_proj"])}.items():
        settings = json.loads(os.environ["SETTINGS"]) | {"output_dir": name, "hub_strategy": "checkpoint"}
        trainer = RobustDPOTrainer(
            "tester/base", args=RobustDPOConfig(**settings), train_dataset=pairs, eval_dataset=pairs,
            peft_config=peft_config,
        )
        trainer.train()
        # A user may save, and describe, in any order.
        trainer.create_model_card()
        trainer.save_model()
        trainer.push_to_hub(dataset_name="tester/pairs", tags=["mine"])
        if peft_config is not None:
            trainer.model.save_pretrained("plain")  # PEFT's own card, to compare
        trainer._finish_current_push()
        state = trainer.model.state_dict()
        torch.save({key: value for key, value in state.items() if peft_config is None or "lora" in key}, name + ".pt")
"""

PULL = """
    import json, os
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = {}
    for name, kind in {"full": AutoModelForCausalLM, "adapter": AutoPeftModelForCausalLM}.items():
        pulled, trained = kind.from_pretrained("tester/" + name).state_dict(), torch.load(name + ".pt")
        found[name] = all(torch.equal(tensor, pulled[key]) for key, tensor in trained.items()) and len(trained)
        found[name + " tokenizer"] = AutoTokenizer.from_pretrained("tester/" + name).eos_token
    print(json.dumps(found))
"""


def test_push_and_pull(hub, run_python, tiny_model_path, make_pairs, cpu_arguments, tmp_path):
    make_pairs(16).save_to_disk(tmp_path / "pairs")
    settings = cpu_arguments | {
        "push_to_hub": True, "max_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps",
        "eval_steps": 1, "learning_rate": 0.1,
    }  # fmt: skip
    environment = {"MODEL": tiny_model_path, "PAIRS": str(tmp_path / "pairs"), "SETTINGS": json.dumps(settings)}
    run_python(textwrap.dedent(TRAIN), environment)
    found = json.loads(run_python(textwrap.dedent(PULL)).splitlines()[-1])
    assert found["full"] > 10 and found["adapter"] == 4
    assert found["full tokenizer"] == found["adapter tokenizer"] == "<eos>"
    assert hub.unrouted == []

    for name, library, loader in [
        ("full", "transformers", "AutoModelForCausalLM"),
        ("adapter", "peft", "AutoPeftModelForCausalLM"),
    ]:
        files = hub.files(f"tester/{name}")
        text = files["README.md"].decode()
        assert "None" not in text and "More Information Needed" not in text
        card = ModelCard(text)
        assert card.data.library_name == library and card.data.base_model == "tester/base"
        assert {"hfnoise", "robust-dpo", "dpo", "trl", "mine"} <= set(card.data.tags)
        assert card.data.datasets == ["tester/pairs"]
        assert f'{loader}.from_pretrained("tester/{name}")' in text
        assert "eval_loss" not in text and "| loss |" in text
        block = card.data.to_dict()["hfnoise"]
        assert block["method"] == "robust-dpo" and block["loss_type"] == ["sym"] and block["flip_rate"] == "auto"
        assert block["flip_rate_refused"] is True  # 16 pairs are too few
    # Checkpoints are pushed during training; PEFT would leave a card of its own in each of them.
    assert "robust-dpo" in hub.files("tester/adapter")["last-checkpoint/README.md"].decode()
    assert "More Information Needed" in (tmp_path / "plain" / "README.md").read_text()
