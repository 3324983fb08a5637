"""A private run with push_to_hub: weights to the bit, report and card beside them at every push, and no secret."""

import io
import json
import textwrap
import zipfile

import pytest
from huggingface_hub import ModelCard

pytestmark = [pytest.mark.hub, pytest.mark.slow]  # fresh processes that import all libraries

TRAIN = """
    import json, os
    import torch
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, SFTConfig, SFTTrainer
    from hfnoise import DPConfig, DPDPOTrainer, DPSFTTrainer, make_private

    torch.set_num_threads(1)
    AutoModelForCausalLM.from_pretrained(os.environ["MODEL"]).push_to_hub("base")
    PreTrainedTokenizerFast.from_pretrained(os.environ["MODEL"]).push_to_hub("base")
    pairs = load_from_disk(os.environ["PAIRS"])
    texts = pairs.select_columns(["prompt"]).rename_column("prompt", "text")
    config = DPConfig(noise_multiplier=1.0, secret_file="keys/secret", ledger_file="keys/ledger.json")
    base = json.loads(os.environ["SETTINGS"])

    class OurSFTTrainer(SFTTrainer):
        pass

    def build(name):
        settings = base | {"output_dir": name, "hub_strategy": "every_save", "hub_token": "hf_x"}
        common = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}
        if name == "dpo":
            args = DPOConfig(**settings, beta=0.5)
            return DPDPOTrainer("tester/base", args=args, train_dataset=pairs, dp_config=config, **common)
        common |= {"args": SFTConfig(**settings), "train_dataset": texts, "eval_dataset": texts}
        if name == "sft":
            return DPSFTTrainer("tester/base", dp_config=config, **common)
        return make_private(OurSFTTrainer("tester/base", **common), config)

    for name in ("sft", "dpo", "made"):
        trainer = build(name)
        trainer.train()
        trainer.save_state()  # trainer_state.json into the folder that is pushed
        trainer._finish_current_push()
        if name == "sft":  # what stands there before the last push
            from huggingface_hub import hf_hub_download
            pushed = json.load(open(hf_hub_download("tester/sft", "dp_report.json")))
        trainer.push_to_hub(dataset_name="tester/pairs", tags=["mine"])
        torch.save({key: value for key, value in trainer.model.state_dict().items() if "lora" in key}, name + ".pt")
    print(json.dumps(pushed["steps"]))
"""

PULL = """
    import json
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    found = {}
    for name in ("sft", "dpo", "made"):
        pulled = AutoPeftModelForCausalLM.from_pretrained("tester/" + name).state_dict()
        trained = torch.load(name + ".pt")
        found[name] = all(torch.equal(tensor, pulled[key]) for key, tensor in trained.items()) and len(trained)
        moved = sum(tensor.abs().sum().item() for key, tensor in trained.items() if "lora_B" in key)
        assert moved > 0 and AutoTokenizer.from_pretrained("tester/" + name).eos_token == "<eos>"
    print(json.dumps(found))
"""


def contents(name, data):
    """Return the bytes of a file and of what is packed in it."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return b"".join(archive.read(entry) for entry in archive.namelist())


def test_push_and_pull(hub, run_python, tiny_model_path, make_pairs, cpu_arguments, tmp_path):
    make_pairs(24).save_to_disk(tmp_path / "pairs")
    settings = {name: value for name, value in cpu_arguments.items() if name != "beta"} | {
        "push_to_hub": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1,
    }  # fmt: skip
    environment = {"MODEL": tiny_model_path, "PAIRS": str(tmp_path / "pairs"), "SETTINGS": json.dumps(settings)}
    output = run_python(textwrap.dedent(TRAIN), environment)
    assert int(output.splitlines()[-1]) in (1, 2)  # a report was pushed while training
    found = json.loads(run_python(textwrap.dedent(PULL)).splitlines()[-1])
    assert found == {"sft": 8, "dpo": 8, "made": 8}
    assert hub.unrouted == []

    secret = (tmp_path / "keys" / "secret").read_text().strip()
    fingerprint = json.loads((tmp_path / "sft" / "checkpoint-1" / "dp_state.json").read_text())["fingerprint"]
    for name, private_name in {"sft": "DPSFTTrainer", "dpo": "DPDPOTrainer", "made": "PrivateOurSFTTrainer"}.items():
        files = hub.files(f"tester/{name}")
        assert not [file for file in files if "rng_state" in file or "checkpoint" in file or "dp_state" in file]
        for file, data in files.items():
            held = contents(file, data)
            for forbidden in (secret.encode(), bytes.fromhex(secret), fingerprint.encode()):
                assert forbidden not in held, file
        history = json.loads(files["trainer_state.json"])["log_history"]
        assert history and not {"loss", "num_tokens", "entropy"} & {key for entry in history for key in entry}
        report = json.loads(files["dp_report.json"])
        assert report["private"] is True and report["steps"] == 2 and 0 < report["epsilon"] < report["delta"] ** -1
        text = files["README.md"].decode()
        assert "None" not in text and "More Information Needed" not in text and report["statement"] in text
        card = ModelCard(text)
        block = card.data.to_dict()["hfnoise"]
        assert block["method"] == private_name and block["epsilon"] == report["epsilon"]
        assert card.data.library_name == "peft" and card.data.base_model == "tester/base"
        assert card.data.datasets == ["tester/pairs"] and {"mine", "differential-privacy"} <= set(card.data.tags)
        assert f'AutoPeftModelForCausalLM.from_pretrained("tester/{name}")' in text
        assert "hf_x" not in text
