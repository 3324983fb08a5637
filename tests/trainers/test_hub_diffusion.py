"""A denoiser that is pushed at every save: its weights, averaged, and its card; loaded by stock diffusers."""

import textwrap

import pytest
from huggingface_hub import ModelCard

pytestmark = [pytest.mark.hub, pytest.mark.slow]  # fresh processes that import all libraries

TRAIN = """
    import sys
    import torch
    from peft import LoraConfig
    from tests.trainers.diffusion_world import make_rows, new_trainer

    torch.set_num_threads(1)
    for name, peft in (("tiny-unet", None), ("tiny-lora", LoraConfig(r=2, target_modules=["to_q"]))):
        trainer = new_trainer(
            name, eval_rows=make_rows(4), trainer_options={"peft_config": peft}, push_to_hub=True, hub_token="hf_x",
            hub_strategy="every_save", save_strategy="steps", save_steps=2, max_steps=4, ema_decay=0.9, snr_gamma=5.0,
        )
        trainer.train()
        trainer._finish_current_push()
        print("pushed", sorted(path.name for path in __import__("pathlib").Path(name).iterdir()))
        trainer.evaluate()
        trainer.push_to_hub(dataset_name="tester/rows", tags=["mine"])
        with trainer.average.in_place_of(trainer.model):
            torch.save({n: p.clone() for n, p in trainer.model.state_dict().items()}, f"{name}.pt")
"""

PULL = """
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from huggingface_hub import HfApi

    unet = UNet2DConditionModel.from_pretrained("tester/tiny-unet")
    expected = torch.load("tiny-unet.pt")
    print("full", all(torch.equal(value, expected[name]) for name, value in unet.state_dict().items()))
    print("files", sorted(HfApi().list_repo_files("tester/tiny-lora")))
    layers, networks = StableDiffusionPipeline.lora_state_dict("tester/tiny-lora")
    expected = torch.load("tiny-lora.pt")
    names = {name: name.removeprefix("unet.").replace(".weight", ".default.weight") for name in layers}
    print("lora", len(layers) > 0, all(torch.equal(value, expected[names[name]]) for name, value in layers.items()))
"""


def test_pushed_and_loaded_by_stock_diffusers(hub, run_python, tmp_path):
    pushed = run_python(textwrap.dedent(TRAIN))
    assert "diffusion_pytorch_model.safetensors" in pushed and "pytorch_lora_weights.safetensors" in pushed
    lines = run_python(textwrap.dedent(PULL)).splitlines()
    assert "full True" in lines and "lora True True" in lines
    files = next(line for line in lines if line.startswith("files"))
    assert "README.md" in files and "ema.safetensors" not in files and "checkpoint" not in files
    card = ModelCard.load(tmp_path / "tiny-lora" / "README.md")
    assert card.data.library_name == "diffusers" and card.data.datasets == ["tester/rows"]
    assert {"lora", "diffusers-training", "mine"} <= set(card.data.tags)
    assert "pipe.load_lora_weights" in card.text and "MinSNRWeighting(gamma=5.0)" in card.text
    assert "| loss at fixed noise |" in card.text and "None" not in card.text
    full = ModelCard.load(tmp_path / "tiny-unet" / "README.md")
    assert "UNet2DConditionModel.from_pretrained" in full.text and "| `ema_decay` | 0.9 |" in full.text
