"""dp_check and padding: a row alone is collated alone, so what the padding of its batch changes is found."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, TrainingArguments

from hfnoise import DPConfig, DPDPOTrainer, DPSFTTrainer, DPTrainer, dp_check
from hfnoise.trainers.private_check_rows import check_rows

LENGTHS = [5, 9, 4, 9, 9, 7, 12, 9]


def collator(side, positions=False, mask=True):
    """Return a collator as users write them: padded on one side, with or without position_ids."""

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in rows:
            ids, missing = row["input_ids"], longest - len(row["input_ids"])
            for name, value, filler in (
                ("input_ids", ids, 0),
                # The first token would be predicted from padding where there is some, and from nothing alone.
                ("labels", ids if side == "right" else [-100, *ids[1:]], -100),
                ("attention_mask", [1] * len(ids), 0),
            ):
                padding = [filler] * missing
                batch[name].append(padding + value if side == "left" else value + padding)
        batch = {name: torch.tensor(value) for name, value in batch.items()}
        if positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if not mask:
            del batch["attention_mask"]
        return batch

    return collate


def private(model, collate, adapter, folder):
    rows = Dataset.from_dict({"input_ids": [[3 + (n + i) % 15 for i in range(n)] for n in LENGTHS]})
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", per_device_train_batch_size=4)
    config = DPConfig(noise_multiplier=1.0, unsafe_seed=5)
    return DPTrainer(get_peft_model(model, adapter), arguments, collate, rows, dp_config=config)


@pytest.fixture
def gpt2(tmp_path):
    def make(*settings):
        torch.manual_seed(0)
        size = {"vocab_size": 22, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
        model = GPT2LMHeadModel(GPT2Config(**size, pad_token_id=0, bos_token_id=1, eos_token_id=1))
        adapter = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        return private(model, collator(*settings), adapter, tmp_path)

    return make


def test_absolute_positions_with_padding_on_the_left(gpt2):
    """The same tokens at other positions: a unit's gradient would depend on the longest row beside it."""
    with pytest.raises(ValueError, match=r"of the row alone by .* position_ids"):
        dp_check(gpt2("left"))


@pytest.mark.parametrize("settings", [("left", True), ("right",), ("right", False, False)], ids=str)
def test_padding_that_changes_nothing(settings, gpt2):
    assert dp_check(gpt2(*settings)).error_alone < 1e-5


def test_positions_that_are_relative(tiny_model_path, tmp_path):
    model, adapter = LlamaForCausalLM.from_pretrained(tiny_model_path), LoraConfig(r=2, target_modules=["q_proj"])
    assert dp_check(private(model, collator("left"), adapter, tmp_path)).error_alone < 1e-5


@pytest.mark.parametrize("trainer_class", [DPSFTTrainer, DPDPOTrainer])
def test_rows_alone_have_no_padding_of_the_batch(trainer_class, make_private_trainer):
    trainer = make_private_trainer(trainer_class)
    rows = check_rows(trainer.planned_rows(), trainer.model, 3)
    widths = [single["input_ids"].shape[1] for single in rows.singles]
    assert max(widths) == rows.batch["input_ids"].shape[1] > min(widths)
    for place, single in enumerate(rows.singles):
        mine = slice(place, None, 3)
        real = rows.batch["attention_mask"][mine].bool()
        assert torch.equal(single["input_ids"][single["attention_mask"].bool()], rows.batch["input_ids"][mine][real])
    assert dp_check(trainer).error_alone < 1e-5
