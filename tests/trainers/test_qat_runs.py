"""Quantisation-aware training in two processes, in front of TRL's Trainers, and from the command line."""

import pytest
import torch
import yaml
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hfnoise import QATSFTConfig, QATSFTTrainer, QuestConfig, prepare_qat
from hfnoise.__main__ import main
from tests.conftest import WORDS
from tests.trainers.qat_world import float_model, logged, make, weights
from tests.trainers.test_qat import ONE_STEP


def equal_to_one_process(path, folder, settings, expected, tensors):
    trainer = make(path, folder / "two", per_device_train_batch_size=2, **settings)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    for name, values in expected.items():
        if name != "qat/weight_bits" or trainer.is_world_process_zero():
            assert logged(trainer, name) == pytest.approx(values, rel=1e-5), name
    ours = weights(trainer)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=1e-5)  # sums in another order
    sums = gather_object([sum(float(tensor.double().sum()) for tensor in ours.values())])
    assert sums[0] == sums[1]
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    ids = torch.tensor([[5, 6, 7]])
    saved = AutoModelForCausalLM.from_pretrained(folder / "two")
    assert torch.equal(saved(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.slow
def test_two_processes_are_one(tiny_model_path, tmp_path, two_processes):
    settings = {"bits": 2, "distillation_weight": 0.5, **ONE_STEP}
    one = make(tiny_model_path, tmp_path / "one", **settings)
    one.train()
    names = ("loss", "grad_norm", "qat/distillation_loss", "qat/weight_bits")
    expected = {name: logged(one, name) for name in names}
    two_processes(equal_to_one_process, tiny_model_path, tmp_path, settings, expected, weights(one))


def same_bits_on_both(path, folder):
    trainer = make(path, folder, bit_schedule="8:0.5,1:0.5", per_device_train_batch_size=2)
    trainer.train()
    state = gather_object([(weights(trainer)["model.layers.0.mlp.up_proj.weight"].double().sum().item(),)])
    assert state[0] == state[1]
    bits = gather_object([trainer.model.model.layers[0].mlp.up_proj.quantization.weight_bits])
    assert bits == [1, 1]


@pytest.mark.slow
def test_a_schedule_in_two_processes(tiny_model_path, tmp_path, two_processes):
    two_processes(same_bits_on_both, tiny_model_path, tmp_path)


@pytest.mark.slow
def test_in_front_of_sft(tiny_model_path, tokenizer, cpu_arguments, make_texts, tmp_path):
    arguments = {name: value for name, value in cpu_arguments.items() if name != "beta"}
    losses = []
    for model in (tiny_model_path, float_model(tiny_model_path)):  # by name, and in memory
        args = QATSFTConfig(**arguments | {"bit_schedule": "4:0.4,1:0.6"})
        trainer = QATSFTTrainer(model, args=args, train_dataset=make_texts(16), processing_class=tokenizer)
        trainer.train()
        assert logged(trainer, "qat/weight_bits") == [4, 1, 1]
        losses.append(logged(trainer))
    assert losses[0] == losses[1]
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7]])
    saved = AutoModelForCausalLM.from_pretrained(arguments["output_dir"])
    assert torch.equal(saved(ids).logits, trainer.model.eval()(ids).logits)
    with pytest.raises(ValueError, match="computes its loss without them"):
        QATSFTTrainer(
            float_model(tiny_model_path), args=QATSFTConfig(**arguments | {"bits": 4, "distillation_weight": 0.5}),
            train_dataset=make_texts(16), processing_class=tokenizer,
        )  # fmt: skip


@pytest.mark.slow
def test_adapters_on_a_prepared_model(tiny_model_path, tokenizer, cpu_arguments, make_texts):
    from peft import LoraConfig, PeftModel

    arguments = {name: value for name, value in cpu_arguments.items() if name != "beta"}
    model = prepare_qat(float_model(tiny_model_path), QuestConfig(bits=4))
    trainer = QATSFTTrainer(
        model, args=QATSFTConfig(**arguments), train_dataset=make_texts(16), processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    base = prepare_qat(float_model(tiny_model_path), QuestConfig(bits=4))
    ids = torch.tensor([[5, 6, 7]])
    again = PeftModel.from_pretrained(base, arguments["output_dir"])
    assert torch.equal(again.eval()(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.slow
def test_command_line(tiny_model_path, tmp_path, capsys):
    texts = [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(20)) for n in range(1, 30)]
    Dataset.from_dict({"words": texts}).to_parquet(tmp_path / "texts.parquet")
    settings = {
        "model_name_or_path": tiny_model_path, "dataset_name": str(tmp_path / "texts.parquet"),
        "output_dir": str(tmp_path / "run"), "text_column": "words", "block_size": 16, "use_cpu": True, "max_steps": 4,
        "bit_schedule": {4: 0.5, 1: 0.5}, "sample_prompt": "the fox", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert main(["qat", "--config", str(config), "--distillation_weight", "0.5"]) == 0
    assert "1 bit: " in capsys.readouterr().out
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert saved.config.quantization_config.activation_bits == 1
    assert "bit_schedule | 4:0.5,1:0.5" in (tmp_path / "run" / "README.md").read_text()

    def error(**changes):
        config.write_text(yaml.safe_dump(settings | changes, sort_keys=False))
        assert main(["qat", "--config", str(config)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "ends with 4 bits" in error(bit_schedule="8:0.5,4:0.5", bits=1)
    assert "has no column 'text'; it has ['words']" in error(text_column="text")
    assert "fewer than one block" in error(block_size=100000)
    assert "trains all weights" in error(use_peft=True)
    assert "use --bits" in error(load_in_4bit=True)
