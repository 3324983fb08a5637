"""What the tests of quantisation-aware training share: a float model, rows of tokens, a trainer on them."""

import torch
from transformers import AutoModelForCausalLM

from hfnoise import QATTrainer, QATTrainingArguments

ARGUMENTS = {
    "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
    "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
}  # fmt: skip


def float_model(path):
    return AutoModelForCausalLM.from_pretrained(path).train()


def rows(count=32, length=12, vocabulary=20):
    """Return rows of tokens; the first labels of a row are ignored, of each row another number."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        ignored = number % 7
        made.append({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
    return made


def make(path, folder, trainer_class=QATTrainer, model=None, teacher_model=None, callbacks=None, **settings):
    return trainer_class(
        model=float_model(path) if model is None else model,
        args=QATTrainingArguments(output_dir=str(folder), **ARGUMENTS | settings),
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=callbacks,
        **({} if teacher_model is None else {"teacher_model": teacher_model}),
    )


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
