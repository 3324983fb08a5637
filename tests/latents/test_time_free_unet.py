"""The network without time: golden vectors, configuration, forms, redirects, LoRA."""

import json
import logging

import numpy
import pytest
import torch
from diffusers import UNet2DConditionModel

from hfnoise.latents import ResidualStatistics
from hfnoise.latents.hf_checkpoints import convert_oms_checkpoint, load_module, load_oms_components
from hfnoise.latents.hf_time_free_unet import (
    TimeFreeUNet2DConditionModel,
    module_output,
    module_residuals,
    set_module_residuals,
)
from tests.conftest import VECTORS

STATISTICS = ResidualStatistics([0.1, 0.0, 0.0, 0.0], torch.eye(4).tolist())


@pytest.fixture(scope="module")
def vectors():
    arrays = dict(numpy.load(VECTORS / "one_more_step" / "dev_timefree_unet.npz"))
    tensors = {key: torch.as_tensor(value) for key, value in arrays.items() if key != "config"}
    return json.loads(str(arrays["config"])), tensors


@pytest.fixture
def unet(vectors):
    config, tensors = vectors
    unet = TimeFreeUNet2DConditionModel(**config).eval()
    unet.load_state_dict({key[2:]: value for key, value in tensors.items() if key.startswith("w.")}, strict=True)
    return unet


@pytest.fixture
def inputs(vectors):
    return vectors[1]["sample"], vectors[1]["encoder_hidden_states"]


@pytest.fixture
def no_log(caplog):
    """diffusers warns by its log, which does not reach pytest unless it propagates."""
    logger = logging.getLogger("diffusers")
    before, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = before
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def output(module, inputs):
    with torch.no_grad():
        return module_output(module, *inputs)


def test_golden_vectors(unet, inputs, vectors):
    assert (output(unet, inputs) - vectors[1]["out"]).abs().max() <= 1e-5


def test_round_trip(unet, inputs, tmp_path, no_log):
    set_module_residuals(unet, STATISTICS)
    unet.save_pretrained(tmp_path)
    again = TimeFreeUNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(output(again, inputs), output(unet, inputs))
    assert module_residuals(again) == STATISTICS
    copied = TimeFreeUNet2DConditionModel.from_config(again.config)
    assert module_residuals(copied) == STATISTICS and copied.config.attention_head_dim == [2, 4]
    assert not any(
        "time" in name for name in json.loads((tmp_path / "config.json").read_text()) if "addition" not in name
    )


def test_gradient_checkpointing(unet, inputs):
    gradients = []
    for _ in range(2):
        unet.zero_grad()
        unet.train()(*inputs).sample.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
        unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.slow
def test_lora(unet, inputs, vectors):
    from peft import LoraConfig, get_peft_model

    before = output(unet, inputs)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.equal(output(unet, inputs), before)
    unet.disable_adapters()
    assert torch.equal(output(unet, inputs), before)
    # PEFT's own model around it, and around a stock one.
    stock = UNet2DConditionModel.from_config(vectors[0]).eval()
    for module in (TimeFreeUNet2DConditionModel.from_config(unet.config).eval(), stock):
        before = output(module, inputs)
        peft = get_peft_model(module, LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        assert torch.equal(output(peft, inputs), before)


def test_stock_form_and_back(unet, inputs, tmp_path, no_log):
    set_module_residuals(unet, STATISTICS)
    unet.save_pretrained(tmp_path / "ours")
    convert_oms_checkpoint(tmp_path / "ours", tmp_path / "stock")
    stock = UNet2DConditionModel.from_pretrained(tmp_path / "stock")
    assert torch.equal(output(stock, inputs), output(unet, inputs))
    assert type(load_module(tmp_path / "stock")) is UNet2DConditionModel
    convert_oms_checkpoint(tmp_path / "stock", tmp_path / "back", stock=False)
    back = load_module(tmp_path / "back")
    assert type(back) is TimeFreeUNet2DConditionModel
    assert module_residuals(stock) == module_residuals(back) == STATISTICS
    assert torch.equal(output(back, inputs), output(unet, inputs))


@pytest.mark.slow
def test_a_fixed_timestep_is_a_bias(vectors, inputs, tmp_path):
    torch.manual_seed(0)
    stock = UNet2DConditionModel(**vectors[0]).eval()
    stock.save_pretrained(tmp_path / "stock")
    converted = convert_oms_checkpoint(tmp_path / "stock", tmp_path / "ours", stock=False)
    assert (output(converted, inputs) - output(stock, inputs)).abs().max() <= 1e-6


@pytest.mark.slow
def test_singdiffusion_checkpoints(unet, inputs, tmp_path):
    """Saved under the stock name, with the embedding of the time and without its projections."""
    from safetensors.torch import load_file, save_file

    unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    width = 4 * unet.config.block_out_channels[0]
    weights |= {f"time_embedding.linear_{i}.bias": torch.ones(width) for i in (1, 2)}
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))
    module = load_module(tmp_path)
    assert type(module) is TimeFreeUNet2DConditionModel
    assert torch.equal(output(module, inputs), output(unet, inputs))


@pytest.fixture(scope="module")
def text_repository(tmp_path_factory):
    """A pipeline's folder with a text encoder 16 wide and its tokenizer."""
    from hfnoise.worlds.tiny_pipelines.unets import new_text_parts

    folder = tmp_path_factory.mktemp("text")
    for name, part in new_text_parts().items():
        part.save_pretrained(folder / name)
    return folder


def official(unet, folder, encoder, subfolder="text_encoder", variant="fp16"):
    """Write what an official repository looks like."""
    unet.save_pretrained(folder / "oms_module", variant=variant)
    config = folder / "oms_module" / "config.json"
    entries = json.loads(config.read_text())
    # Released ones have a sub-folder in their config too.
    entries |= {"_class_name": "UNet2DConditionWoCTModel", "subfolder": "oms_module"}
    config.write_text(json.dumps(entries))
    for name, place in (("oms_text_encoder", subfolder), ("oms_tokenizer", "tokenizer")):
        (folder / name).mkdir()
        redirect = {"_name_or_path": str(encoder), "subfolder": place}
        (folder / name / "config.json").write_text(json.dumps(redirect))
    return folder


@pytest.mark.slow
def test_redirects(unet, inputs, text_repository, tmp_path):
    repo = official(unet, tmp_path, text_repository)
    found = load_oms_components(repo, variant="fp16")
    assert torch.equal(output(found.module, inputs), output(unet, inputs))
    assert found.text_encoder.config.hidden_size == 16
    assert found.tokenizer("the digit seven").input_ids[0] == 1
    assert load_oms_components(repo, variant="fp16", text_encoder=False).text_encoder is None
    for stock in (True, False):
        converted = convert_oms_checkpoint(repo, tmp_path / f"converted-{stock}", stock, variant="fp16")
        assert torch.equal(output(converted, inputs), output(unet, inputs))


def test_redirects_to_nowhere(unet, text_repository, tmp_path):
    repo = official(unet, tmp_path, tmp_path / "gone")
    with pytest.raises(OSError, match=r"'text_encoder' of .*gone, which cannot be loaded.*Give text_encoder="):
        load_oms_components(repo, variant="fp16")
    found = load_oms_components(repo, variant="fp16", text_encoder=text_repository)
    again = load_oms_components(repo, "fp16", text_encoder=found.text_encoder, tokenizer=found.tokenizer)
    assert again.text_encoder is found.text_encoder and again.tokenizer is found.tokenizer
    with pytest.raises(ValueError, match="give its tokenizer too"):
        load_oms_components(repo, "fp16", text_encoder=found.text_encoder)


def test_joined_encoders_are_the_pipelines_own(unet, tmp_path):
    repo = official(unet, tmp_path, "stabilityai/sdxl", variant=None)
    config = {"_class_name": "SDXLTextEncoder", "_name_or_path": "stabilityai/sdxl"}
    (repo / "oms_text_encoder" / "config.json").write_text(json.dumps(config))
    assert load_oms_components(repo).text_encoder is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"num_class_embeds": 3}, "num_class_embeds"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    ],
)
def test_what_needs_time_is_refused(options, named):
    with pytest.raises(ValueError, match=f"{named}: a UNet without time"):
        TimeFreeUNet2DConditionModel(**options)


def test_no_module(tmp_path):
    with pytest.raises(ValueError, match="no config.json or oms_module/config.json of a UNet"):
        load_module(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="dst must be a folder"):
        convert_oms_checkpoint(tmp_path, tmp_path / "file")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON"):
        load_module(tmp_path)


def test_the_hub_out_of_reach_is_no_missing_module(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"'someone/module' is no folder here, .* nothing of the repository is in the cache"
    ):
        load_module("someone/module", cache_dir=tmp_path)
    snapshot = tmp_path / "models--someone--module" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").touch()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    with pytest.raises(ValueError, match="someone/module holds no module"):
        load_module("someone/module", cache_dir=tmp_path)
