"""What the Trainer and TRL offer beside a plain run works as it does in trl.DPOTrainer."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, RobustDPOConfig, RobustDPOTrainer

FEATURES = {
    "a reference that follows the policy": {
        "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5,
    },
    "workers": {"dataloader_num_workers": 2},
    "keep_end": {"truncation_mode": "keep_end", "max_length": 8},
}  # fmt: skip
PROMPT_LEARNING = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def assert_equal_runs(stock, ours, losses_of):
    for trainer in (stock, ours):
        trainer.train()
    assert losses_of(stock) == losses_of(ours) and len(set(losses_of(ours))) == 3
    weights = ours.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stock.model.state_dict().items())
    assert stock.evaluate()["eval_loss"] == ours.evaluate()["eval_loss"]


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("feature", FEATURES)
def test_neutral_settings_equal_trl_to_the_bit(make_trainer, make_pairs, losses_of, feature):
    pairs = make_pairs(16, note=["not for the model"] * 16)
    made = [
        make_trainer(trainer_class, config_class, pairs, pairs.select(range(6)), **FEATURES[feature])
        for trainer_class, config_class in ((DPOTrainer, DPOConfig), (NoiseDPOTrainer, NoiseDPOConfig))
    ]
    assert_equal_runs(*made, losses_of)


@pytest.mark.parametrize("kind", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_prompt_learning_equals_trl_to_the_bit(make_trainer, make_pairs, losses_of, kind):
    made = []
    for trainer_class, config_class in ((DPOTrainer, DPOConfig), (NoiseDPOTrainer, NoiseDPOConfig)):
        torch.manual_seed(0)  # of the virtual tokens
        made.append(
            make_trainer(
                trainer_class,
                config_class,
                None,
                make_pairs(8, seed=1),
                peft_config=PROMPT_LEARNING[kind],
                learning_rate=0.3,
            )  # fmt: skip
        )
    assert_equal_runs(*made, losses_of)
    margins = made[1].pair_margins(make_pairs(8, seed=1))
    assert made[1].evaluate()["eval_rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-5)


class OwnCollator(DataCollatorForPreference):
    """Passes on whatever it is given, as many collators do, and remembers the keys."""

    def __call__(self, examples):
        self.keys = set(examples[0])
        return super().__call__(examples)


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_own_collator_sees_what_it_sees_in_trl(
    tiny_model_path, tokenizer, cpu_arguments, make_pairs, losses_of, remove_unused_columns
):
    runs = []
    for trainer_class, config_class, settings in (
        (DPOTrainer, DPOConfig, {"loss_type": "robust", "label_smoothing": 0.2}),
        (NoiseDPOTrainer, NoiseDPOConfig, {"loss_type": "robust", "flip_rate_column": "rate"}),
    ):
        settings["remove_unused_columns"] = remove_unused_columns
        collator = OwnCollator(pad_token_id=0, max_length=20)
        trainer = trainer_class(
            tiny_model_path, args=config_class(**cpu_arguments | settings), data_collator=collator,
            train_dataset=make_pairs(16, rate=[0.2] * 16), processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        runs.append((collator.keys, losses_of(trainer)))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)


@pytest.mark.slow
def test_several_evaluation_datasets_and_the_best_model(make_trainer, make_pairs):
    settings = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_second_loss", "greater_is_better": False,
    }  # fmt: skip
    held_out = {"first": make_pairs(8, seed=1), "second": make_pairs(6, seed=2)}
    logs, margins = [], []
    for trainer_class, config_class, neutral in (
        (DPOTrainer, DPOConfig, {}),
        (RobustDPOTrainer, RobustDPOConfig, {"loss_type": "sigmoid", "flip_rate": 0.0}),
    ):
        trainer = make_trainer(trainer_class, config_class, None, held_out, **settings | neutral)
        trainer.train()
        logs.append({key for entry in trainer.state.log_history for key in entry})
        margins.append(trainer.evaluate("second"))
        assert trainer.state.best_metric == pytest.approx(margins[-1]["eval_loss"], rel=1e-5)
    stock, ours = margins
    assert ours["eval_loss"] == stock["eval_loss"]
    assert {"eval_first_loss", "eval_second_loss"} <= logs[0] <= logs[1]
    # The estimate is of the first dataset, under the model that was kept.
    assert trainer.flip_rate_estimate.count == 8


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_compute_metrics(tiny_model_path, tokenizer, cpu_arguments, make_pairs):
    seen = []

    def count(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"rows": prediction.predictions.shape[0]}

    found = []
    for trainer_class, config_class, settings in (
        (DPOTrainer, DPOConfig, {}),
        (NoiseDPOTrainer, NoiseDPOConfig, {"loss_type": "forward_corrected", "flip_rate_column": "rate"}),
    ):
        trainer = trainer_class(
            tiny_model_path, args=config_class(**cpu_arguments | settings), processing_class=tokenizer,
            train_dataset=make_pairs(8, rate=[0.0] * 8), eval_dataset=make_pairs(6, rate=[0.0] * 6),
            compute_metrics=count,
        )  # fmt: skip
        trainer.train()
        found.append(trainer.evaluate())
    assert seen[0] == seen[1] and found[0]["eval_rows"] == found[1]["eval_rows"]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("streaming", [pytest.param(False, marks=pytest.mark.slow), True])
def test_resume_in_the_middle_of_an_epoch(make_trainer, make_pairs, caplog, streaming):
    # 7 steps of 4 pairs in 2 micro-batches each: 26 pairs are 6 whole steps and a short one.
    settings = {
        "loss_type": "forward_corrected", "flip_rate_column": "rate", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_steps": 11, "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    pairs = make_pairs(26, rate=[0.0, 0.3] * 13)

    def made():
        return make_trainer(
            RobustDPOTrainer, RobustDPOConfig, pairs.to_iterable_dataset() if streaming else pairs, **settings
        )

    whole = made()
    whole.train()
    weights = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    # In the first epoch and, where the Trainer knows how long an epoch is, in the second.
    for step in (3,) if streaming else (3, 9):
        resumed = made()
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert resumed.state.global_step == 11
        assert ("exact only within the first pass" in caplog.text) == streaming
        assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.model.state_dict().items())


def test_skip_is_refused_where_a_gradient_scaler_runs():
    with pytest.raises(ValueError, match="on_nan_log_probs='skip' cannot be combined with fp16=True.*bf16=True"):
        NoiseDPOConfig("unused", use_cpu=True, bf16=False, fp16=True, on_nan_log_probs="skip")
