"""What is saved, merged, pushed and pulled: equal to the bit, loadable by stock code."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, RobustDPOConfig, RobustDPOTrainer


def test_saved_model_is_stock(make_trainer):
    trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in trainer.model.state_dict().items())
    assert AutoTokenizer.from_pretrained(trainer.args.output_dir).eos_token == "<eos>"


def test_adapter_round_trip(make_trainer):
    trainer = make_trainer(
        RobustDPOTrainer, RobustDPOConfig, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), learning_rate=0.1
    )
    trainer.train()
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(trainer.args.output_dir)
    saved = {name: tensor for name, tensor in trainer.model.state_dict().items() if "lora" in name}
    assert saved and any(tensor.abs().sum() > 0 for name, tensor in saved.items() if "lora_B" in name)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.items())
    trainer.create_model_card()
    with open(f"{trainer.args.output_dir}/README.md", encoding="utf-8") as file:
        card = file.read()
    assert "library_name: peft" in card and "AutoPeftModelForCausalLM" in card


def test_reference_cache_depends_on_what_it_should(make_trainer, make_pairs, tmp_path):
    from hfnoise.trainers.noise_dpo_data import reference_key

    make_pairs(8).save_to_disk(tmp_path / "pairs")
    from datasets import load_from_disk

    def key(**settings):
        trainer = make_trainer(
            NoiseDPOTrainer, NoiseDPOConfig, load_from_disk(tmp_path / "pairs"), loss_type="sigmoid",
            precompute_ref_log_probs=True, **settings,
        )  # fmt: skip
        return reference_key(trainer.train_dataset, trainer.args), list(trainer.train_dataset["ref_chosen_logps"])

    base = key()
    assert key(learning_rate=0.5) == base  # TRL computes the reference pass again here
    assert key(max_length=8)[0] != base[0]
    stale_in_trl = key(max_length=None), key(max_length=None, ld_alpha=0.3)
    assert stale_in_trl[0][0] != stale_in_trl[1][0] and stale_in_trl[0][1] != stale_in_trl[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_quantised_base_trains_adapters(tiny_model_path, tokenizer, make_pairs, cpu_arguments, bits):
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    trainer = RobustDPOTrainer(
        tiny_model_path,
        args=RobustDPOConfig(**cpu_arguments | {"flip_rate": 0.2}),
        train_dataset=make_pairs(16),
        processing_class=tokenizer,
        quantization_config=quantization,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]
