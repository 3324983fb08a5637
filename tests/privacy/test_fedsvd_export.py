"""An exported adapter loads with PEFT alone and computes what was trained."""

import pytest
import torch
from peft import LoraConfig, PeftModel

from hfnoise.privacy import LoraRotation, save_lora_adapter
from tests.privacy.lora_models import lora_llama, tiny_llama, token_batch

ALPHA = 8


def logits(model):
    batch = token_batch()
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def federated(rounds=2, **settings):
    """Return a PeftModel after rounds of refresh on q_proj only, with the layers' states: its B A holds the sum."""
    model = lora_llama(lora_alpha=ALPHA, **settings)
    states, generator = {}, torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        linear_A, linear_B = module.lora_A["default"], module.lora_B["default"]
        state = LoraRotation(name, linear_A.weight.detach(), linear_B.weight.detach())
        for seed in range(rounds):
            trained = state.lora_B + 0.3 * torch.randn(state.lora_B.shape, generator=generator)
            state.advance(trained, replaced=4 if "q_proj" in name else 0, seed=seed)
        states[name] = state
        # For reference, the sum goes into the base weight.
        whole = state.export()[0].dense()
        module.base_layer.weight.data += module.scaling["default"] * whole
        linear_B.weight.data.zero_()
    return model, states


@pytest.mark.parametrize("use_rslora", [False, True])
def test_plain_peft_computes_the_same(tmp_path, use_rslora):
    model, states = federated(use_rslora=use_rslora)
    scaling = ALPHA / (2 if use_rslora else 4)
    config = model.peft_config["default"]
    left_out = save_lora_adapter(tmp_path, {n: s.export()[0] for n, s in states.items()}, config, scaling)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert set(left_out.values()) == {0.0} and len(left_out) == 4
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=2e-5, rtol=1e-5)
    assert (logits(loaded) - logits(tiny_llama())).abs().max() > 0.05
    written = LoraConfig.from_pretrained(tmp_path)
    # All directions of q_proj were replaced twice, those of v_proj never: ranks 4 (1 + 2) and 4.
    assert {written.r, *written.rank_pattern.values()} == {4, 12}
    assert {written.lora_alpha, *written.alpha_pattern.values()} == {4 * scaling, 12 * scaling}
    for name, module in loaded.named_modules():
        if hasattr(module, "lora_A"):
            assert module.r["default"] == (12 if "q_proj" in name else 4)
            assert module.scaling["default"] == pytest.approx(scaling)
    assert config.use_rslora is use_rslora and config.r == 4


def test_truncated_to_a_chosen_rank(tmp_path):
    model, states = federated()
    config = model.peft_config["default"]
    scalings = {name: 2.0 for name in states}
    factors = {name: state.export()[0] for name, state in states.items()}
    # Of the 12, 4 are new and hold nothing yet: 8 would lose nothing.
    left_out = save_lora_adapter(tmp_path / "6", factors, config, scalings, rank=6)
    assert all((error > 0.1) == ("q_proj" in name) for name, error in left_out.items())
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "6")
    name = next(name for name in left_out if "q_proj" in name)
    module = dict(loaded.base_model.model.named_modules())[name]
    exact = 2.0 * states[f"base_model.model.{name}"].export()[0].dense()
    rest = torch.linalg.matrix_norm(module.get_delta_weight("default") - exact).item()
    assert module.r["default"] == 6 and rest == pytest.approx(left_out[name], rel=1e-4)
    # Nothing is lost at the full rank.
    save_lora_adapter(tmp_path / "12", factors, config, scalings, rank=12)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "12")
    torch.testing.assert_close(logits(loaded), logits(model), atol=2e-5, rtol=1e-5)


def test_initialisations_that_change_the_base_are_not_written(tmp_path):
    factors = {"q_proj": (torch.ones(2, 3), torch.ones(4, 2))}
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
    save_lora_adapter(tmp_path, factors, config, 0.3)
    written = LoraConfig.from_pretrained(tmp_path)
    assert written.init_lora_weights is True and written.lora_alpha == pytest.approx(0.6)
    assert config.init_lora_weights == "pissa"


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"use_dora": True}, {}, "use_dora=True: DoRA has a magnitude"),
        ({"bias": "all"}, {}, "bias='all'"),
        ({"modules_to_save": ["score"]}, {}, "extra_state no weight of 'score'"),
        ({}, {"factors": {}}, "no factors"),
        ({}, {"factors": {"q": (torch.full((1, 2), float("nan")), torch.ones(3, 1))}}, "lora_A of 'q' holds 2"),
        ({}, {"factors": {"q": (torch.ones(1, 2), torch.ones(3, 2))}}, "of 'q' must have the shapes"),
        ({}, {"scaling": {"v": 1.0}}, r"scaling has the layers \['v'\]"),
    ],
)
def test_bad_input(tmp_path, settings, options, message):
    arguments = {"factors": {"q": (torch.ones(1, 2), torch.ones(3, 1))}, "scaling": 1.0, **options}
    with pytest.raises(ValueError, match=message):
        save_lora_adapter(tmp_path / "x", config=LoraConfig(target_modules=["q"], **settings), **arguments)
    assert not (tmp_path / "x").exists()


def test_heads_are_written_if_given(tmp_path):
    from safetensors.torch import load_file

    factors = {"q": (torch.ones(1, 2), torch.ones(3, 1))}
    config = LoraConfig(target_modules=["q"], modules_to_save=["score"])
    extra = {"base_model.model.score.weight": torch.ones(2, 3)}
    save_lora_adapter(tmp_path, factors, config, 1.0, extra_state=extra)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight", "base_model.model.score.weight",
    }  # fmt: skip
