"""What transformers' side of quantisation does not do: each with what was given, and what to do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.utils import logging

from hfnoise import QuestConfig, dequantize, export_packed, prepare_qat
from tests.quantization.tiny_models import llama

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    export_packed(prepare_qat(llama(), QuestConfig(bits=4))).save_pretrained(folder)
    return folder


@pytest.fixture
def transformers_log():
    """Let pytest see what transformers logs."""
    logging.enable_propagation()
    yield
    logging.disable_propagation()


@pytest.fixture
def changed(packed_folder, tmp_path):
    """Return a function that copies the packed checkpoint with changes, and returns the folder."""

    def make(config=None, **tensors):
        settings = json.loads((packed_folder / "config.json").read_text())
        settings["quantization_config"] |= config or {}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        weights = load_file(packed_folder / "model.safetensors")
        for name, value in tensors.items():
            weights[f"{LAYER}.{name}"] = value
        kept = {name: value for name, value in weights.items() if value is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


SETTINGS = {
    "width": ({"bits": 9}, "1.58"),
    "width of inputs": ({"weight_bits": 4, "activation_bits": 0}, "1.58"),
    "unknown": ({"bit": 4}, r"no bit; it has weight_bits"),
    "two ways": ({"bits": 4, "weight_bits": 2}, "bits sets weight_bits and activation_bits"),
    "inputs alone": ({"activation_bits": 4}, "without weight_bits"),
    "version": ({"version": 2}, "version 2 of the format; this hfnoise reads up to 1"),
    "no version": ({"version": "new"}, "whole number"),
    "group": ({"hadamard_group": -4}, "hadamard_group"),
    "trust": ({"bits": 1, "trust_factor": 0.0}, "trust_factor"),
    "estimator": ({"estimator": "pact"}, "choose quest, ste"),
    "packed lsq": ({"estimator": "lsq", "store_master_weights": False}, "no packed form"),
    "one name": ({"modules_to_not_convert": "lm_head"}, "a list of names"),
    "text for yes": ({"store_master_weights": "yes"}, "True or False"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    settings, message = SETTINGS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        QuestConfig(**settings)


def test_names_that_match_nothing():
    with pytest.raises(
        ValueError, match=r"'gate', which matches no module of LlamaForCausalLM. Its linear layers: down"
    ):
        prepare_qat(llama(), QuestConfig(bits=4, modules_to_not_convert=["mlp", "gate"]))
    model = prepare_qat(llama(), QuestConfig(bits=4, modules_to_not_convert=["up_proj"]))
    assert model.quest_skipped[LAYER] == "in modules_to_not_convert"
    with pytest.raises(ValueError, match="no linear layer to quantise; left out: .*lm_head"):
        prepare_qat(llama(), QuestConfig(bits=4, modules_to_not_convert=["model"]))


def test_models_in_the_wrong_state():
    model = prepare_qat(llama(), QuestConfig(bits=4))
    with pytest.raises(ValueError, match="quantised already"):
        prepare_qat(model, QuestConfig(bits=4))
    with pytest.raises(ValueError, match="store_master_weights=False, which packs"):
        prepare_qat(llama(), QuestConfig(bits=4, store_master_weights=False))
    for function in (export_packed, dequantize):
        with pytest.raises(ValueError, match="no quantised layer"):
            function(llama())
    with pytest.raises(ValueError, match="packed already"):
        export_packed(export_packed(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value, tmp_path, caplog, transformers_log):
    model = llama()
    model.get_submodule(LAYER).weight.data[3, 1] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{LAYER}.weight has 1 entries"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=QuestConfig(bits=4))
    # transformers collects what conversions raise, logs it with the name, and raises an error of its own.
    with pytest.raises(RuntimeError, match="CONVERSION"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=QuestConfig(bits=4, store_master_weights=False))
    assert f"{LAYER}.weight: x holds NaN or infinity" in " ".join(caplog.text.split())
    model = prepare_qat(model, QuestConfig(bits=4))
    kind = type(model.get_submodule(LAYER))
    with pytest.raises(ValueError, match=f"{LAYER}.weight: .*NaN"):
        export_packed(model)
    assert type(model.get_submodule("model.layers.0.self_attn.q_proj")) is kind  # nothing was changed


def test_checkpoint_of_a_newer_version(changed):
    with pytest.raises(ValueError, match="pip install -U hfnoise"):
        LlamaForCausalLM.from_pretrained(changed({"version": 2}))


@pytest.mark.parametrize("settings", [{"weight_bits": 2}, {"weight_bits": 8}])
def test_checkpoint_of_another_width(settings, changed):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(changed(settings))


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"weight": torch.zeros(1, 64, 3, dtype=torch.uint8)}, "mismatched"),
        ({"weight_scale": torch.ones(3)}, "mismatched"),
        ({"weight_scale": None}, rf"lacks 1 packed weights or scales \({LAYER}.weight_scale"),
    ],
)
def test_broken_checkpoints(tensors, message, changed):
    with pytest.raises((RuntimeError, ValueError), match=message):
        LlamaForCausalLM.from_pretrained(changed(**tensors))


def test_packed_weights_on_the_disk(packed_folder, tmp_path):
    parts = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="to the disk"):
        LlamaForCausalLM.from_pretrained(packed_folder, device_map=parts, offload_folder=tmp_path)
