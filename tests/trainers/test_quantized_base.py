"""A 4-bit base on a CPU keeps its gradients when it is evaluated in mid-training."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer
from hfnoise.trainers.quantized_base import keep_differentiable
from tests.conftest import build_tokenizer


@pytest.fixture
def four_bit(tmp_path):
    """Return a function that loads a tiny Llama in 4 bits; 64 wide, for blocks of 64."""
    folder = tmp_path / "wide"
    tokenizer = build_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("precompute", [False, True])
def test_an_evaluation_changes_nothing(precompute, four_bit, cpu_arguments, make_pairs, tmp_path, losses_of):
    found = []
    for evaluated in (False, True):
        torch.manual_seed(0)
        args = NoiseDPOConfig(**cpu_arguments, loss_type="sym", precompute_ref_log_probs=precompute)
        trainer = NoiseDPOTrainer(
            four_bit(), args=args, train_dataset=make_pairs(12), eval_dataset=make_pairs(4, seed=1),
            processing_class=AutoTokenizer.from_pretrained(tmp_path / "wide"),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        )  # fmt: skip
        if evaluated:
            trainer.evaluate()
        trainer.train()
        found.append(losses_of(trainer))
    assert found[0] == found[1] and len(set(found[0])) == 3


def test_packed_already():
    class Packed(torch.nn.Module):
        support_avx512bf16_for_cpu = True
        weight = type("Weight", (), {"quant_state": type("State", (), {"packing_format_for_cpu": True})})

    with pytest.raises(ValueError, match="were packed for inference.*Load the model anew"):
        keep_differentiable(torch.nn.Sequential(Packed()))
