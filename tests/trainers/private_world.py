"""Builds private Trainers on the tiny model, for the tests of what they write."""

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hfnoise import DPConfig, DPDPOTrainer, DPSFTTrainer, DPTrainer, make_private

TEXTS = Dataset.from_dict(
    {"text": [f"the quick {word} fox jumps" for word in "brown lazy green old quiet".split() * 4]}
)


class MySFTTrainer(SFTTrainer):
    """A subclass of someone else's."""


class MyDPOTrainer(DPOTrainer):
    """A subclass of someone else's."""


def token_rows():
    return [{"input_ids": [3 + i % 9, 4, 5], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(20)]


def private_trainer(kind, model, folder, pairs=None, dp=None, **settings):
    """Return a private Trainer: `kind` is sft, dpo, plain, or one of the first two made private afterwards."""
    config = DPConfig(**{"noise_multiplier": 1.0, "unsafe_seed": 0, **(dp or {})})
    common = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip
    if kind == "plain":
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
        config.grad_mode = "loop"
        return DPTrainer(
            model, args=TrainingArguments(**common | settings), train_dataset=token_rows(), dp_config=config
        )
    kinds = {"sft": (DPSFTTrainer, MySFTTrainer, SFTConfig), "dpo": (DPDPOTrainer, MyDPOTrainer, DPOConfig)}
    private_class, stock_class, arguments_class = kinds[kind.removeprefix("made ")]
    arguments = arguments_class(**{**common, "activation_checkpointing": False, "max_length": 32, **settings})
    given = {
        "args": arguments,
        "train_dataset": TEXTS if kind.endswith("sft") else pairs,
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"]),
    }
    if kind.startswith("made "):
        return make_private(stock_class(model, **given), config)
    return private_class(model, dp_config=config, **given)
