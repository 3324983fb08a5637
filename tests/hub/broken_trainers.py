"""Trainers that push what they trained, each push broken in every way of tests/hub/broken.py, and then whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from tests.hub.broken import break_next, break_pushes, digest

ROWS = [{"input_ids": [3 + (n * k) % 17 for k in range(12)]} for n in range(16)]


def arguments(name):
    return {
        "output_dir": name, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1,
        "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 0.1, "push_to_hub": True,
        "hub_model_id": f"tester/{name}",
    }  # fmt: skip


def text_arguments(name):
    return {**arguments(name), "activation_checkpointing": False, "max_length": 32}


def trainers():
    """Return one of each family, by the name of its repository."""
    from datasets import Dataset, load_from_disk
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    import hfnoise
    from tests.trainers.diffusion_world import new_trainer

    model, pairs = os.environ["MODEL"], load_from_disk(os.environ["PAIRS"])
    texts = Dataset.from_dict({"text": [f"the quick {w} fox jumps" for w in "brown lazy green old".split() * 4]})
    lora = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
    made = {
        "preference": hfnoise.RobustDPOTrainer(
            model, args=hfnoise.RobustDPOConfig(**text_arguments("preference"), flip_rate=0.1), train_dataset=pairs
        ),
        "private": hfnoise.DPSFTTrainer(
            model, args=SFTConfig(**text_arguments("private")), train_dataset=texts,
            dp_config=hfnoise.DPConfig(noise_multiplier=1.0), **lora,
        ),
        "quantized": hfnoise.QATTrainer(
            AutoModelForCausalLM.from_pretrained(model),
            args=hfnoise.QATTrainingArguments(**arguments("quantized"), bits=1),
            train_dataset=[row | {"labels": row["input_ids"]} for row in ROWS],
        ),
        "denoiser": new_trainer("denoiser", push_to_hub=True, hub_model_id="tester/denoiser", max_steps=1),
    }  # fmt: skip
    federation = hfnoise.FedSVDTrainer(
        model, args=SFTConfig(**text_arguments("federation")), client_column="owner",
        fedsvd_config=hfnoise.FedSVDConfig(rounds=1, local_steps=1, aggregation="ffa"),
        train_dataset=texts.add_column("owner", ["alice", "bob"] * 8), **lora,
    )  # fmt: skip
    return made | {"federation": federation}


def push():
    """Train each, break its pushes, and write down what the last one holds."""
    said, expected = {}, {}
    for name, trainer in trainers().items():
        trainer.train()
        local, kept = [], Path(name)

        def upload(trainer=trainer, local=local, kept=kept):
            try:
                trainer.push_to_hub()
            finally:
                local.append(digest(kept))

        said[name] = break_pushes(
            f"tester/{name}", lambda trainer=trainer: change(trainer), upload, skip=["the repository is refused"],
            patient=name == "preference",
        )  # fmt: skip
        # Whatever broke, the folder held the whole new model, as the push that went through left it.
        weights = {path for path in local[-1] if path.endswith(".safetensors") and "federation/" not in path}
        assert weights and all(one[path] == local[-1][path] for one in local[1:] for path in weights), name
        expected[name] = {path: local[-1][path] for path in weights}
        assert "README.md" in local[1]

    # Without push_to_hub=True the repository is made by the push itself, after the model is saved.
    late = trainers()["preference"]
    late.train()
    late.hub_model_id, late.args.hub_model_id, late.args.output_dir = None, "tester/late", "late"
    break_next({"pattern": "POST /api/repos/create", "status": 501})
    try:
        late.push_to_hub()
    except OSError as error:
        said["late"] = {"the repository is refused": str(error)}
    assert break_next() and {"model.safetensors", "config.json", "README.md"} <= digest("late").keys()
    torch.save(expected, "expected.pt")
    print(json.dumps(said))


def change(trainer):
    if hasattr(trainer, "server"):
        trainer.server._lora_B = {name: torch.randn_like(one) for name, one in trainer.server._lora_B.items()}
        return
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


def pull():
    """Download each in another process and load it with its own class."""
    import hashlib

    from diffusers import UNet2DConditionModel
    from huggingface_hub import hf_hub_download
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    import hfnoise  # noqa: F401

    loaders = {
        "preference": AutoModelForCausalLM, "private": AutoPeftModelForCausalLM, "quantized": AutoModelForCausalLM,
        "denoiser": UNet2DConditionModel, "federation": AutoPeftModelForCausalLM,
    }  # fmt: skip
    found = {}
    for name, files in torch.load("expected.pt").items():
        loaders[name].from_pretrained(f"tester/{name}")
        there = {path: Path(hf_hub_download(f"tester/{name}", path)).read_bytes() for path in files}
        found[name] = {path: hashlib.sha256(data).hexdigest() for path, data in there.items()} == files
    reports = {"private": "dp_report.json", "federation": "federation_report.json"}
    for name, report in reports.items():
        found[report] = json.loads(Path(hf_hub_download(f"tester/{name}", report)).read_text()) == json.loads(
            Path(name, report).read_text()
        )
    print(json.dumps(found))
