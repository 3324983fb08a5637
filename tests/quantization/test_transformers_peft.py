"""LoRA on master and on packed weights: train, save, load; merging is warned of or refused, DoRA on packed refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hfnoise import QuestConfig, export_packed, prepare_qat
from tests.quantization.tiny_models import gpt2, llama, logits, train

BUILDERS = {"llama": llama, "gpt2": gpt2}


def base(name, packed):
    model = prepare_qat(BUILDERS[name](), QuestConfig(bits=4))
    return export_packed(model) if packed else model


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


@pytest.mark.parametrize(
    "name, packed",
    [("llama", True), ("llama", False), *(pytest.param("gpt2", p, marks=pytest.mark.slow) for p in (0, 1))],
)
def test_train_save_load(name, packed, tmp_path):
    model = get_peft_model(base(name, packed), lora())
    before = logits(base(name, packed))
    assert torch.equal(logits(model), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    after = logits(train(model, steps=3))
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(base(name, packed), tmp_path).eval()
    assert torch.equal(logits(fresh), after)
    with fresh.disable_adapter():
        assert torch.equal(logits(fresh), before)
    assert torch.equal(logits(fresh.unload()), before)


def test_merging():
    model = get_peft_model(base("llama", packed=True), lora(init_lora_weights=False))
    before = logits(model.eval())
    with pytest.raises(ValueError, match="cannot be merged into packed weights"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)
    master = get_peft_model(base("llama", packed=False), lora(init_lora_weights=False)).eval()
    with pytest.warns(UserWarning, match="rounded"):
        merged = master.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj).__name__ == "QuestLinear"
    reference = logits(merged)
    assert torch.equal(logits(export_packed(merged)), reference)


def test_packed_under_an_adapter(tmp_path):
    model = get_peft_model(base("llama", packed=False), lora(init_lora_weights=False)).eval()
    before = logits(model)
    assert torch.equal(logits(export_packed(model)), before)
    with pytest.raises(ValueError, match="cannot be merged into packed weights"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base("llama", packed=True), tmp_path)), before)


def test_adapters_come_after_prepare_qat():
    with pytest.raises(ValueError, match="has adapters, which would be quantised too"):
        prepare_qat(get_peft_model(llama(), lora()), QuestConfig(bits=4))


def test_dora():
    with pytest.raises(ValueError, match="use_dora needs the norms of float weights"):
        get_peft_model(base("llama", packed=True), lora(use_dora=True))
    train(get_peft_model(base("llama", packed=False), lora(use_dora=True)), steps=1)


def test_adapters_keep_a_gradient_through_packed_layers():
    # Of the first layer's adapter: it comes through every packed layer above.
    model = get_peft_model(base("llama", packed=True), lora(target_modules=r".*layers\.0\.self_attn\.q_proj"))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    train(model, steps=2)
    assert all(
        not torch.equal(a, p) for a, p in zip(before, [p for p in model.parameters() if p.requires_grad], strict=True)
    )
