"""QATTrainer: equal to the stock Trainer where it adds nothing, and to itself however the batch is split."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hfnoise import ExportPackedCallback, QATTrainer, QuestConfig, prepare_qat
from tests.trainers.qat_world import ARGUMENTS, assert_same, float_model, logged, make, rows, weights

SCHEDULE = "8:0.25,4:0.25,1:0.5"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_neutral_run_is_the_stock_trainer(tiny_model_path, tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "eval_strategy": "steps", "eval_steps": 2}
    ours = make(tiny_model_path, tmp_path / "ours", bits=2, **settings)
    ours.train()

    model = prepare_qat(float_model(tiny_model_path), QuestConfig(bits=2))
    decayed = [p for n, p in model.named_parameters() if "_proj" in n]
    kept = [p for n, p in model.named_parameters() if "_proj" not in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    stock = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path / "stock"), lr_scheduler_type="cosine", warmup_steps=0.1, **ARGUMENTS | settings
        ),
        train_dataset=rows(),
        eval_dataset=rows(8),
        optimizers=(torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True), None),
    )
    stock.train()
    assert_same(weights(ours), weights(stock))
    assert logged(ours) == logged(stock) and logged(ours, "eval_loss") == logged(stock, "eval_loss")
    assert len(set(logged(ours))) == 4


# One step of plain SGD: the weights move by the gradient. (After a step of Adam weights differ in the last bits, some
# activation lies on the edge of a level, and its code is another one: nothing to be said of later losses.)
ONE_STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "warmup_steps": 0, "max_grad_norm": 0.0}


@pytest.mark.parametrize(("bits", "distillation", "batch"), [(4, 0.0, (1, 4)), (1, 0.7, (1, 4)), (4, 1.0, (2, 2))])
def test_accumulation(tiny_model_path, tmp_path, bits, distillation, batch):
    settings = {"bits": bits, "distillation_weight": distillation, **ONE_STEP}
    size, accumulation = batch
    whole = make(tiny_model_path, tmp_path / "a", **settings)
    split = make(
        tiny_model_path, tmp_path / "b", per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        **settings,
    )  # fmt: skip
    for trainer in (whole, split):
        trainer.train()
    # Sums in another order; rows have 6 to 12 predictions, so a mean of means would be off by per cents.
    names = ["loss", "grad_norm"] + (["qat/distillation_loss"] if distillation else [])
    for name in names:
        assert logged(split, name) == pytest.approx(logged(whole, name), rel=1e-5), name
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(split.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_checkpointing_and_resume_inside_of_a_schedule_change_nothing(tiny_model_path, tmp_path):
    settings = {"bit_schedule": SCHEDULE, "max_steps": 8, "distillation_weight": 0.5}
    whole = make(tiny_model_path, tmp_path / "a", save_strategy="steps", save_steps=1, **settings)
    whole.train()
    bits = [
        json.loads((tmp_path / "a" / f"checkpoint-{step}" / "config.json").read_text())["quantization_config"]
        for step in range(1, 9)
    ]
    assert [one["weight_bits"] for one in bits] == [8, 8, 4, 4, 1, 1, 1, 1]
    assert all(one["store_master_weights"] for one in bits)
    assert logged(whole, "qat/weight_bits") == [8, 8, 4, 4, 1, 1, 1, 1]

    for step in (2, 3):  # at the end of a phase, and inside of one
        again = make(tiny_model_path, tmp_path / "b", **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_same(weights(again), weights(whole))
        assert logged(again) == logged(whole)

    checkpointed = make(tiny_model_path, tmp_path / "c", activation_checkpointing=True, **settings)
    checkpointed.train()
    assert_same(weights(checkpointed), weights(whole))

    other = make(tiny_model_path, tmp_path / "d", **settings | {"bit_schedule": "8:0.5,1:0.5"})
    with pytest.raises(ValueError, match=r"at 4 bits after 3 steps.*has 8 there"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


@pytest.mark.parametrize("settings", [{"bits": 1}, {"weight_bits": 4}, {"bits": 3, "hadamard_group": 0}])
def test_saved_is_packed_and_reloaded_equal(tiny_model_path, tmp_path, settings):
    trainer = make(tiny_model_path, tmp_path, max_steps=1, **settings)
    trainer.train()
    before = weights(trainer)
    trainer.save_model()
    assert_same(weights(trainer), before)  # it can be trained on
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.store_master_weights is False
    assert {p.dtype for n, p in loaded.state_dict().items() if n.endswith("q_proj.weight")} == {torch.uint8}
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_dense_export_states_the_difference(tiny_model_path, tmp_path):
    trainer = make(tiny_model_path, tmp_path, bits=2, export="dense", weight_only=True, max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_name="someone/texts")
    difference = trainer.dense_difference
    assert difference["loss"] != difference["dense_loss"] and difference["relative"] > 0.01
    card = (tmp_path / "README.md").read_text()
    assert f"the loss is {difference['dense_loss']:.4f} instead of {difference['loss']:.4f}" in card
    assert "someone/texts" in card and "None" not in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    batch = {name: torch.tensor([row[name] for row in rows(4)]) for name in ("input_ids", "labels")}
    assert loaded(**batch).loss.item() == pytest.approx(difference["dense_loss"], rel=1e-6)


def test_any_trainer_packs_with_the_callback(tiny_model_path, tmp_path):
    model = prepare_qat(float_model(tiny_model_path), QuestConfig(bits=1))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path), **ARGUMENTS | {"max_steps": 1}),
        train_dataset=rows(),
        callbacks=[ExportPackedCallback()],
    )
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model.eval()(ids).logits)


def test_the_groups(tiny_model_path, tmp_path):
    trainer = make(
        tiny_model_path, tmp_path, bits=2, estimator="lsq", step_learning_rate=3e-4, export="master", max_steps=2
    )
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = [{names[id(one)] for one in group["params"]} for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert all("_proj.weight" in name and "step" not in name for name in groups[0]) and len(groups[0]) == 14
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= groups[1]
    assert all(name.endswith("_step") for name in groups[2]) and len(groups[2]) == 28
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2, 3e-4]
    trainer.train()
    assert all(step.item() > 0 for name, step in trainer.model.named_parameters() if name.endswith("_step"))


def test_metrics_name_the_worst_layer(tiny_model_path, tmp_path):
    model = float_model(tiny_model_path)
    with torch.no_grad():  # one entry far out: without a rotation it takes the whole scale of its row
        model.model.layers[1].mlp.up_proj.weight[:, 0] = 50.0
    trainer = make(tiny_model_path, tmp_path, model=model, bits=4, hadamard_group=0, max_steps=1, learning_rate=0.0)
    trainer.train()
    (entry,) = (one for one in trainer.state.log_history if "loss" in one)
    assert entry["qat/worst_layer"] == "model.layers.1.mlp.up_proj"
    assert entry["qat/error_worst"] > 3 * entry["qat/error_mean"] > 0
    assert 0.9 < entry["qat/trust_fraction"] < 1 and 4 < entry["qat/bits_per_weight"] < 32


def test_the_teacher_is_the_float_model(tiny_model_path, tmp_path):
    before = float_model(tiny_model_path)
    trainer = make(tiny_model_path, tmp_path, bits=1, distillation_weight=1.0)
    trainer.train()
    assert_same(trainer._teacher.state_dict(), before.state_dict())
    assert not any(parameter.requires_grad for parameter in trainer._teacher.parameters())
    # The loss of evaluation is the task's.
    batch = {name: torch.tensor([row[name] for row in rows(4)]) for name in ("input_ids", "labels")}
    loss, _, _ = trainer.prediction_step(trainer.model.eval(), batch, prediction_loss_only=True)
    assert loss.item() == pytest.approx(trainer.model(**batch).loss.item(), rel=1e-6)


def test_a_quantised_model_keeps_what_it_has(tiny_model_path, tmp_path):
    quantized = prepare_qat(float_model(tiny_model_path), QuestConfig(bits=2, hadamard_group=16))
    trainer = make(tiny_model_path, tmp_path, model=quantized, max_steps=1)
    trainer.train()
    assert logged(trainer, "qat/weight_bits") == [2]
    make(tiny_model_path, tmp_path, model=quantized, bits=2, hadamard_group=16)
    with pytest.raises(ValueError, match=r"weight_bits 1 \(the model has 2\)"):
        make(tiny_model_path, tmp_path, model=quantized, bits=1)
    with pytest.raises(ValueError, match="hadamard_group"):
        make(tiny_model_path, tmp_path, model=quantized, hadamard_group=32)
    with pytest.raises(ValueError, match="no full-precision model to copy"):
        make(tiny_model_path, tmp_path, model=quantized, distillation_weight=0.5)
    teacher = float_model(tiny_model_path)
    make(tiny_model_path, tmp_path, model=quantized, distillation_weight=0.5, teacher_model=teacher)


def test_best_checkpoints_are_of_the_last_phase(tiny_model_path, tmp_path):
    trainer = make(
        tiny_model_path, tmp_path, bit_schedule="8:0.5,1:0.5", max_steps=4, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert min(losses[:2]) < min(losses[2:])  # so without care the best would be one of 8 bits
    assert Path(trainer.state.best_model_checkpoint).name in ("checkpoint-3", "checkpoint-4")
    assert isinstance(trainer, QATTrainer)


def test_a_run_that_is_stopped_early_says_at_which_bits(tiny_model_path, tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = make(tiny_model_path, tmp_path, bit_schedule="8:0.5,1:0.5", callbacks=[Stop()])
    with caplog.at_level("WARNING", logger="hfnoise"):
        trainer.train()
    assert "the model is at 8 bits, not at 1" in caplog.text
