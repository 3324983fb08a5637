"""Stock Trainers on a model with a QuestConfig: checkpoints, resume, two processes, packed without adapters."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hfnoise import QuestConfig, export_packed, prepare_qat
from tests.quantization.tiny_models import llama, logits, quantized


def data(count=32):
    # Four rows, again and again, so that a few steps learn something.
    rows = torch.randint(2, 40, (4, 8), generator=torch.Generator().manual_seed(0)).tolist() * (count // 4)
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def arguments(folder, **changes):
    return TrainingArguments(
        **{
            "output_dir": str(folder), "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4,
            "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
            "seed": 3, **changes,
        }
    )  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(folder, model, resume=None, **changes):
    trainer = Trainer(model=model, args=arguments(folder, **changes), train_dataset=data())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(folder):
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=QuestConfig(bits=2))


def test_trainer_checkpoints_and_resume(loaded, folder, tmp_path):
    whole = trained(tmp_path / "whole", loaded, save_strategy="steps", save_steps=2)
    assert len(losses(whole)) == 4 and min(losses(whole)) < losses(whole)[0]
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert quantized(reloaded) == quantized(loaded) != []
    assert torch.equal(logits(reloaded), logits(whole.model.eval()))

    fresh = LlamaForCausalLM.from_pretrained(folder, quantization_config=QuestConfig(bits=2))
    resumed = trained(tmp_path / "resumed", fresh, resume=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name

    reference = logits(resumed.model.eval())
    export_packed(resumed.model)
    resumed.save_model(tmp_path / "packed")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "packed")), reference)


def test_accumulated_and_checkpointed_training_starts_alike(loaded, folder, tmp_path):
    plain = trained(tmp_path, loaded, max_steps=1)
    for changes in (
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ):
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=QuestConfig(bits=2))
        assert losses(trained(tmp_path, model, max_steps=1, **changes)) == pytest.approx(losses(plain), rel=1e-6)


def test_packed_weights_without_adapters_are_refused(tmp_path):
    model = export_packed(prepare_qat(llama(), QuestConfig(bits=2)))
    with pytest.raises(ValueError, match="cannot|adapters"):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=data())


@pytest.mark.slow
def test_sft(loaded, tmp_path, tokenizer):
    from trl import SFTConfig, SFTTrainer

    options = {"max_length": 8, "bf16": False, "activation_checkpointing": False}
    config = SFTConfig(**{**arguments(tmp_path).to_dict(), **options})
    trainer = SFTTrainer(
        loaded, args=config, train_dataset=data().remove_columns("labels"), processing_class=tokenizer
    )
    trainer.train()
    assert min(losses(trainer)) < losses(trainer)[0]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_dpo(packed, tiny_model_path, tokenizer, make_pairs, cpu_arguments):
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    def load():
        config = QuestConfig(bits=4, store_master_weights=not packed)
        return LlamaForCausalLM.from_pretrained(tiny_model_path, quantization_config=config)

    model = load()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = DPOTrainer(
        model, args=DPOConfig(**cpu_arguments), train_dataset=make_pairs(), processing_class=tokenizer,
        ref_model=None if packed else load(),
        peft_config=LoraConfig(r=2, target_modules="all-linear") if packed else None,
    )  # fmt: skip
    trainer.train()
    # The reference model is quantised as the policy is: the first loss is log 2.
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    if packed:
        kept = {
            n.replace("base_model.model.", "").replace(".base_layer", ""): v for n, v in model.state_dict().items()
        }
        assert all(torch.equal(value, kept[name]) for name, value in before.items() if name in kept)
        assert "model.layers.0.mlp.up_proj.weight_scale" in kept
    else:
        assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.slow
def test_dpo_takes_the_float_checkpoint_for_reference(tiny_model_path, tokenizer, make_pairs, cpu_arguments):
    """TRL loads the reference by the name of the policy, without its quantisation, unless `ref_model` is given."""
    from trl import DPOConfig, DPOTrainer

    model = LlamaForCausalLM.from_pretrained(tiny_model_path, quantization_config=QuestConfig(bits=4))
    trainer = DPOTrainer(
        model, args=DPOConfig(**cpu_arguments), train_dataset=make_pairs(), processing_class=tokenizer
    )
    assert quantized(trainer.ref_model) == []


def train_and_save(model_path, folder):
    model = LlamaForCausalLM.from_pretrained(model_path, quantization_config=QuestConfig(bits=2))
    # The same global batch of 4 as one process with 4.
    trainer = trained(folder, model, per_device_train_batch_size=2, ddp_backend="gloo", max_steps=1, optim="sgd")
    assert trainer.args.world_size == 2
    found = losses(trainer), {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.save(found, folder / f"{trainer.args.process_index}.pt")


@pytest.mark.slow
def test_two_processes(folder, tmp_path, two_processes, loaded):
    two_processes(train_and_save, folder, tmp_path)
    (found_losses, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    one = trained(tmp_path / "one", loaded, per_device_train_batch_size=4, max_steps=1, optim="sgd")
    assert found_losses == pytest.approx(losses(one), rel=1e-5)
    for name, parameter in one.model.named_parameters():
        assert torch.equal(first[name], second[name])
        # Sums in another order: float32 rounding. (More steps would part: a weight at the edge of a cell changes its
        # level by a rounding, and from there on everything differs a little.)
        torch.testing.assert_close(first[name], parameter, rtol=1e-5, atol=1e-6, msg=name)
