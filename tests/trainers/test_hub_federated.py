"""A federation with push_to_hub: adapter, report and card, and nothing of the clients' folders."""

import textwrap

import pytest

pytestmark = [pytest.mark.hub, pytest.mark.slow]

TRAIN = """
    import os
    from datasets import load_from_disk
    from huggingface_hub import HfApi
    from peft import LoraConfig
    from trl import SFTConfig
    from hfnoise import DPConfig, FedSVDConfig, FedSVDTrainer

    trainer = FedSVDTrainer(
        os.environ["MODEL"],
        args=SFTConfig(
            "fed", use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True,
            per_device_train_batch_size=4, max_length=32, hub_model_id="tester/fed",
        ),
        fedsvd_config=FedSVDConfig(rounds=1, local_steps=1),
        train_dataset=load_from_disk(os.environ["TEXTS"]),
        client_column="owner",
        dp_config=DPConfig(noise_multiplier=1.0),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    trainer.push_to_hub("first", token="hf_given", tags=["mine"])
    trainer.args.hub_model_id = "tester/side"
    trainer.push_to_hub("second", revision="round-1", token="hf_given")
    found = HfApi(token="hf_given").list_repo_files("tester/side", revision="round-1")
    assert "adapter_model.safetensors" in found, found
    assert "adapter_model.safetensors" not in HfApi(token="hf_given").list_repo_files("tester/side")
    try:
        trainer.push_to_hub(tag="mine")
    except TypeError as error:
        print(error)
"""


def test_push(hub, run_python, tiny_model_path, make_texts, tmp_path):
    make_texts(16, owner=["alice", "bob"] * 8).save_to_disk(tmp_path / "texts")
    output = run_python(textwrap.dedent(TRAIN), {"MODEL": tiny_model_path, "TEXTS": str(tmp_path / "texts")})
    assert "unexpected keyword argument 'tag'" in output
    files = hub.files("tester/fed")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "federation_report.json"} <= set(files)
    assert not [name for name in files if "client" in name or "federation/" in name or "ledger" in name]
    assert "- mine" in files["README.md"].decode()
    assert hub.unrouted == []
