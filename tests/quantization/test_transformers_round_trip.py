"""Float weights -> trained quantised -> packed -> saved -> loaded -> saved -> loaded: equal logits, bit by bit."""

import json
import os

import pytest
import torch

from hfnoise import QuestConfig, dequantize, export_packed, prepare_qat, quantization_report
from tests.quantization.tiny_models import BUILDERS, TOKENS, gpt2, llama, logits, mixtral, quantized, train

pytestmark = pytest.mark.filterwarnings("ignore:.*stacked experts")

WIDTHS = [1, 1.58, 2, 3, 4, 8]
CASES = [
    *(("llama", bits) for bits in WIDTHS),
    *(("gpt2", bits) for bits in WIDTHS),
    *((name, 4) for name in ("classifier", "gpt2 48 wide", "mixtral", "t5")),
]
DEFAULT = [("llama", 1), ("gpt2", 3), ("classifier", 4), ("t5", 4)]


@pytest.mark.parametrize(
    "name, bits", [pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow) for case in CASES]
)
def test_round_trip(name, bits, tmp_path):
    model = prepare_qat(BUILDERS[name](), QuestConfig(bits=bits))
    reference = logits(train(model))
    model.save_pretrained(tmp_path / "master")
    assert torch.equal(logits(export_packed(model)), reference)
    model.save_pretrained(tmp_path / "packed")
    for source, target in (("packed", "again"), ("again", "third")):
        model = type(model).from_pretrained(tmp_path / source)
        assert torch.equal(logits(model), reference)
        model.save_pretrained(tmp_path / target)
    sizes = [os.path.getsize(tmp_path / kind / "model.safetensors") for kind in ("packed", "again", "third")]
    assert len(set(sizes)) == 1 and sizes[0] < os.path.getsize(tmp_path / "master" / "model.safetensors")

    master = type(model).from_pretrained(tmp_path / "master")
    assert torch.equal(logits(master), reference)
    assert master.is_quantized is False  # an ordinary model, for Trainers and casts
    assert quantized(master) == quantized(model) != []


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("build", [llama, pytest.param(gpt2, marks=pytest.mark.slow)])
def test_packing_while_loading_equals_export(build, dtype, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    config = {"weight_bits": 2, "activation_bits": 8}
    loaded = type(model).from_pretrained(
        tmp_path, dtype=dtype, quantization_config=QuestConfig(**config, store_master_weights=False)
    )
    exported = export_packed(prepare_qat(type(model).from_pretrained(tmp_path, dtype=dtype), QuestConfig(**config)))
    assert loaded.state_dict().keys() == exported.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in (loaded, exported)), strict=True))
    assert torch.equal(logits(loaded), logits(exported))


def test_half_precision_after_loading(tmp_path):
    export_packed(prepare_qat(llama(), QuestConfig(bits=4))).save_pretrained(tmp_path)
    kind = type(llama())
    at_once, later = kind.from_pretrained(tmp_path, dtype=torch.bfloat16), kind.from_pretrained(tmp_path)
    later.to(torch.bfloat16)
    # Not the logits: stock code rounds the rotary frequencies of `later`.
    layers = [model.model.layers[0].mlp.up_proj for model in (at_once, later)]
    assert [layer.weight_scale.dtype for layer in layers] == [torch.float32] * 2
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(*(layer(x) for layer in layers))
    # Of transformers, for any packed model.
    with pytest.raises(ValueError, match="half"):
        later.half()
    master = prepare_qat(llama(), QuestConfig(bits=4)).half()
    assert logits(master).dtype == torch.float16
    assert torch.equal(logits(export_packed(master)), logits(prepare_qat(llama(), QuestConfig(bits=4)).half()))


@pytest.mark.parametrize("build", [llama, *(pytest.param(build, marks=pytest.mark.slow) for build in (gpt2, mixtral))])
def test_weight_only_models_become_stock_ones(build, tmp_path):
    model = train(prepare_qat(build(), QuestConfig(weight_bits=3)))
    reference, kind = logits(model), type(model)
    export_packed(model).save_pretrained(tmp_path / "packed")
    with pytest.warns(UserWarning, match="dequantize"):
        by_argument = kind.from_pretrained(
            tmp_path / "packed", quantization_config=QuestConfig(weight_bits=3, dequantize=True)
        )
    for dense in (by_argument, dequantize(model), kind.from_pretrained(tmp_path / "packed").dequantize()):
        assert torch.equal(logits(dense), reference)
        assert quantized(dense) == []
        dense.save_pretrained(tmp_path / "dense")
        assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
        assert torch.equal(logits(kind.from_pretrained(tmp_path / "dense")), reference)


def test_dequantizing_quantized_activations_is_refused(tmp_path):
    model = export_packed(prepare_qat(llama(), QuestConfig(bits=8)))
    model.save_pretrained(tmp_path)
    kind, before = type(model), logits(model)
    with pytest.raises(ValueError, match="weight_only=True"):
        dequantize(model)
    with (
        pytest.warns(UserWarning, match="dequantize"),
        pytest.raises(ValueError, match=r"quantises inputs too.*weight_only=True"),
    ):
        kind.from_pretrained(tmp_path, quantization_config=QuestConfig(bits=8, dequantize=True))
    assert torch.equal(logits(model), before)
    dense = logits(dequantize(model, weight_only=True))
    assert not torch.equal(dense, before)
    torch.testing.assert_close(dense, before, rtol=0.1, atol=0.3)  # 8-bit activations are within a percent each


def test_stacked_experts_are_reported():
    with pytest.warns(UserWarning, match="MixtralForCausalLM keeps 2 weights of stacked experts as floats") as caught:
        model = prepare_qat(mixtral(), QuestConfig(bits=2))
    assert len(caught) == 1
    skipped = quantization_report(model).skipped
    experts = [name for name in skipped if "experts" in name]
    assert experts and all("three dimensions" in skipped[name] for name in experts)
    assert not any("experts" in name or name.endswith("gate") for name in quantized(model))


def test_heads_stay():
    model = prepare_qat(BUILDERS["classifier"](), QuestConfig(bits=2))
    assert type(model.score) is torch.nn.Linear
    assert "score" in model.quest_skipped
    assert all(name.startswith("model.layers.") for name in quantized(model))
    assert "score" in str(quantization_report(model))


def test_a_layer_with_two_names_is_one_layer():
    """As the heads of detection models, which the decoder holds too."""
    linear = torch.nn.Linear(64, 64)
    model, x = torch.nn.Sequential(linear, torch.nn.ReLU(), linear), torch.randn(2, 64)
    prepare_qat(model, QuestConfig(weight_bits=2))
    assert type(model[2]).__name__ == "QuestLinear" and model[2] is model[0]
    expected = model(x)
    for change, name in ((export_packed, "QuestPackedLinear"), (dequantize, "Linear")):
        change(model)
        assert type(model[2]).__name__ == name and model[2] is model[0]
        assert torch.equal(model(x), expected)


@pytest.mark.slow
def test_a_layer_whose_weight_is_read_and_that_is_not_called_stays():
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    model = prepare_qat(MambaForCausalLM(MambaConfig(**sizes)).eval(), QuestConfig(bits=2))
    expected = logits(model)
    assert torch.equal(logits(export_packed(model)), expected)
    assert "not called" in model.quest_skipped["backbone.layers.0.mixer.dt_proj"]


@pytest.mark.parametrize("packed", [False, True])
def test_checkpoints_load_under_another_head(packed, tmp_path):
    """What was left out by name need not be there, and has no prefix in the base model."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    left = ["lm_head", "model.layers.0.mlp.down_proj"]
    model = prepare_qat(llama(), QuestConfig(bits=2, modules_to_not_convert=left))
    with torch.no_grad():
        expected = model.model(TOKENS).last_hidden_state
        (export_packed(model) if packed else model).save_pretrained(tmp_path)
        base = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(base(TOKENS).last_hidden_state, expected)
    assert type(base.layers[0].mlp.down_proj) is torch.nn.Linear
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
