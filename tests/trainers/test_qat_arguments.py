"""Arguments of quantisation-aware training are refused at construction, wherever they come from."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from hfnoise import QATArguments, QATTrainer, QATTrainingArguments, QuestConfig, export_packed, prepare_qat
from hfnoise.trainers.qat_distillation import distillation_loss
from hfnoise.trainers.qat_schedule import BitSchedule, parse_bit_schedule
from tests.trainers.qat_world import float_model, make


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "bits is 9"),
        ({"weight_bits": "one"}, "weight_bits must be a finite number or None, got 'one'"),
        ({"bits": True}, "bits must be a finite number or None, got True"),
        ({"bits": 2, "weight_bits": 2}, "bits sets weight_bits and activation_bits"),
        ({"activation_bits": 4}, "without weight_bits"),
        ({"trust_factor": 0}, "trust_factor is 0"),
        ({"hadamard_group": -1}, "hadamard_group is -1"),
        ({"hadamard_group": 2.5}, "whole number"),
        ({"estimator": "magic"}, "estimator is 'magic'"),
        ({"estimator": "ste", "trust_factor": 1.0}, "trust_factor is read by"),
        ({"modules_to_not_convert": "router"}, "modules_to_not_convert must be a list of texts"),
        ({"bits": 1, "bit_schedule": "8:0.5,4:0.5"}, "ends with 4 bits"),
        ({"weight_bits": 1, "bit_schedule": "8:0.5,1/4:0.5"}, "which are not quantised"),
        ({"bit_schedule": "8:0.5,1:0.6"}, "sum to 1.1"),
        ({"bit_schedule": "8:0.5;1:0.5"}, "entry"),
        ({"bit_schedule": "8:-1,1:2"}, "share '-1'"),
        ({"bit_schedule": "9:0.5,1:0.5"}, "'9'; allowed"),
        ({"bit_schedule": 4}, "bit_schedule is 4"),
        ({"distillation_weight": 1.5}, "in \\[0, 1\\]"),
        ({"distillation_weight": "half"}, "distillation_weight must be a finite number, got 'half'"),
        ({"distillation_weight": 0.5, "distillation_temperature": 0}, "above 0"),
        ({"distillation_temperature": 2.0}, "nothing reads it"),
        ({"step_learning_rate": 0}, "above 0"),
        ({"step_learning_rate": 1e-3, "estimator": "quest"}, "for estimator='lsq'"),
        ({"export": "zip"}, "export is 'zip'"),
        ({"export": "packed", "weight_only": True}, "read by export='dense' only"),
        ({"estimator": "lsq"}, "no packed form"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QATArguments(**settings)


def test_numbers_of_yaml_and_command_lines():
    arguments = QATArguments(weight_bits="1", activation_bits=8.0, trust_factor="1.25")
    assert (arguments.weight_bits, arguments.activation_bits, arguments.trust_factor) == (1, 8, 1.25)
    for given in ("8:0.25, 1:0.75", {8: 0.25, 1: 0.75}, {"8": "0.25", "1": "0.75"}, [[8, 0.25], [1, 0.75]]):
        arguments = QATArguments(bit_schedule=given)
        assert arguments.bit_schedule == "8:0.25,1:0.75"
        assert (arguments.quest_config().weight_bits, arguments.quest_config().activation_bits) == (1, 1)


def test_what_the_user_sets_wins(tmp_path):
    ours = QATTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (ours.weight_decay, ours.adam_beta2, ours.warmup_steps, ours.max_grad_norm) == (0.1, 0.95, 0.1, 1.0)
    given = QATTrainingArguments(str(tmp_path), use_cpu=True, weight_decay=0.0, lr_scheduler_type="linear")
    assert given.weight_decay == 0.0 and given.lr_scheduler_type == "linear"


def test_schedule_of_weights_and_activations():
    schedule = BitSchedule(parse_bit_schedule("8:0.3,4/6:0.3,1:0.4"), 1, 4)
    assert [phase[:2] for phase in schedule.phases] == [(8, 8), (4, 6), (1, 4)]
    assert schedule.starts(10) == [0, 3, 6] and schedule.at(5, 10) == (4, 6) and schedule.at(9, 10) == (1, 4)
    with pytest.raises(ValueError, match="without a step in 1 steps"):
        schedule.starts(1)


def test_distillation_is_the_divergence_per_prediction():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 0]])
    wanted = 0.0
    for row, column in ((0, 0), (0, 2), (1, 2)):
        p, q = (torch.softmax(one[row, column] / 2, 0) for one in (teacher, student))
        wanted += 4 * float((p * (p / q).log()).sum())
    assert distillation_loss(student, teacher, labels, 2.0).item() == pytest.approx(wanted / 3, rel=1e-5)
    assert distillation_loss(student, teacher, labels, 2.0, count=6).item() == pytest.approx(wanted / 6, rel=1e-5)
    with pytest.raises(ValueError, match="have shapes"):
        distillation_loss(student, teacher[..., :4], labels)


def test_name_in_the_place_of_a_model_is_refused():
    with pytest.raises(TypeError, match="loads no names.*from_pretrained"):
        QATTrainer("some/name", args=QATTrainingArguments(output_dir="unused", bits=1, use_cpu=True))


def test_models_that_cannot_be_trained_so(tiny_model_path, tmp_path):
    packed = export_packed(prepare_qat(float_model(tiny_model_path), QuestConfig(bits=1)))
    with pytest.raises(ValueError, match="packed already.*load the master weights"):
        make(tiny_model_path, tmp_path, model=packed)
    with pytest.raises(ValueError, match="matches no module"):
        make(tiny_model_path, tmp_path, modules_to_not_convert=["router"])
    with pytest.raises(ValueError, match="without a step in 3 steps"):
        make(tiny_model_path, tmp_path, bit_schedule="8:0.1,1:0.9", max_steps=3)
    with pytest.raises(ValueError, match="stock layers, which do not quantise activations"):
        make(tiny_model_path, tmp_path, bits=4, export="dense")
    with pytest.raises(ValueError, match="distillation_weight is 0"):
        make(tiny_model_path, tmp_path, bits=4, teacher_model=float_model(tiny_model_path))
    other = AutoModelForCausalLM.from_config(type(float_model(tiny_model_path).config)(
        vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    ))  # fmt: skip
    with pytest.raises(ValueError, match="a vocabulary of 7"):
        make(tiny_model_path, tmp_path, bits=4, distillation_weight=0.5, teacher_model=other)
    with pytest.raises(ValueError, match="needs args of a class with QATArguments"):
        QATTrainer(float_model(tiny_model_path), args=TrainingArguments(str(tmp_path), use_cpu=True))


def test_sharded_weights_are_not_packed(tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"needs whole weights.*hfnoise pack"):
        make(tiny_model_path, tmp_path, bits=4)
