"""The example of DiffusionTrainer: an adapter and all weights, on the digits, from its YAML."""

import runpy
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from hfnoise.trainers.image_datasets import world_images
from hfnoise.worlds.digits import DIGITS

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "examples" / "configs" / "text_to_image.yaml"
SHORT = ["--config", str(CONFIG), "--max_steps", "4", "--disable_tqdm", "true", "--warmup_steps", "0"]


@pytest.fixture
def example():
    return runpy.run_path(str(ROOT / "examples" / "diffusion" / "train_text_to_image.py"))["main"]


def test_bad_input_is_one_line(example, capsys, tmp_path):
    options = ["--output_dir", str(tmp_path / "out")]
    assert example([*SHORT, *options, "--snr_gamma", "-1"]) == 2
    assert "gamma of min-SNR" in capsys.readouterr().err
    assert example([*SHORT, *options, "--dataset_name", "hfnoise:letters"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: there are no images named 'hfnoise:letters'")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_checkpoint_is_one_line(example, capsys, tmp_path):
    options = ["--output_dir", str(tmp_path / "out"), "--latents_dir", str(tmp_path / "latents")]
    assert example([*SHORT, *options, "--resume_from_checkpoint", "true"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no complete checkpoint in")


@pytest.mark.slow
def test_an_adapter_and_all_weights(example, capsys, tmp_path):
    folders = {rank: tmp_path / rank for rank in ("lora", "whole")}
    splits = {name: one.select(range(64)) for name, one in world_images(DIGITS).items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "rows")
    common = [*SHORT, "--dataset_name", str(tmp_path / "rows"), "--latents_dir", str(tmp_path / "latents")]
    assert example([*common, "--output_dir", str(folders["lora"])]) == 0
    first = capsys.readouterr().out
    assert "loss at fixed noise, on images that were held out: 0.0" in first
    settings = CONFIG.read_text(encoding="utf-8").replace("lora_r: 16", "")
    (tmp_path / "whole.yaml").write_text(settings)
    rest = [*common[2:], "--learning_rate", "1e-3", "--output_dir", str(folders["whole"])]
    assert example(["--config", str(tmp_path / "whole.yaml"), *rest]) == 0
    weak = DiffusionPipeline.from_pretrained(ROOT / "model_cards" / "digits-sd-weak")
    before = {name: value.clone() for name, value in weak.unet.state_dict().items()}
    whole = UNet2DConditionModel.from_pretrained(folders["whole"]).state_dict()
    assert any(not torch.equal(before[name], whole[name]) for name in before)
    weak.load_lora_weights(folders["lora"])  # stock diffusers does
    assert weak.get_active_adapters()
    for folder in folders.values():
        assert "MinSNRWeighting(gamma=5.0)" in (folder / "README.md").read_text()
