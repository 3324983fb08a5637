"""What a federation exports: heads that were frozen, and refusals at once instead of after the last round."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from hfnoise import FedSVDConfig, FedSVDServer


@pytest.mark.parametrize("settings", [{"task_type": "SEQ_CLS"}, {}], ids=str)
def test_frozen_head_of_a_classifier_is_exported(settings, tiny_model_path, tmp_path):
    """PEFT lists 'classifier' and 'score' for every classifier; this one has a score, drawn at random."""
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=3)
    model = get_peft_model(classifier, LoraConfig(r=2, target_modules=["q_proj"], **settings))
    for name, value in model.named_parameters():
        value.requires_grad_("lora_B" in name)
    server = FedSVDServer(model, FedSVDConfig())
    server.take_average({name: torch.randn_like(one.lora_B) for name, one in server.factors().items()})
    server.rotate()
    server.export_adapter(tmp_path)

    another_head = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=3)
    loaded = PeftModel.from_pretrained(another_head, tmp_path).eval()
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, server.apply_to(model).eval()(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "wording"),
    [
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "aLoRA is active after these tokens only"),
        ({"trainable_token_indices": [1]}, "trained tokens are not among the factors"),
        ({"init_lora_weights": "pissa"}, "has taken the first factors out of the base weights"),
        ({"init_lora_weights": "olora"}, "has taken the first factors out of the base weights"),
        ({"layer_replication": [(0, 2), (0, 1)]}, "replicated layers change the base model"),
    ],
    ids=lambda given: str(given)[:16],
)
def test_adapters_that_cannot_be_exported_are_refused_at_once(settings, wording, tiny_model_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **settings))
    for name, value in model.named_parameters():
        value.requires_grad_("lora_B" in name)
    with pytest.raises(ValueError, match=wording):
        FedSVDServer(model, FedSVDConfig())


def test_trained_adapter_is_not_dropped_in_silence(tiny_model_path, caplog):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    FedSVDServer(model, FedSVDConfig())
    assert "trained already" not in caplog.text
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.fill_(0.1)
    FedSVDServer(model, FedSVDConfig(init_lora_A="keep"))
    assert "trained already" not in caplog.text
    FedSVDServer(model, FedSVDConfig())
    assert "use init_lora_A='keep'" in caplog.text


@pytest.mark.slow
def test_same_class_of_layer_with_another_quantisation_is_another_base(tiny_model_path):
    pytest.importorskip("bitsandbytes")

    def fingerprint(**settings):
        quantization = BitsAndBytesConfig(load_in_4bit=True, **settings) if settings else None
        base = AutoModelForCausalLM.from_pretrained(tiny_model_path, quantization_config=quantization)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
        return FedSVDServer(model, FedSVDConfig()).base

    normal = fingerprint(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    assert normal == fingerprint(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    assert len({normal, fingerprint(bnb_4bit_quant_type="fp4"), fingerprint()}) == 3
