"""What `hfnoise qat` runs: QATTrainer on texts, from YAML and command line."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import ScriptArguments

from hfnoise.errors import UsageError
from hfnoise.folders import check_writable
from hfnoise.option_types import check_option_types
from hfnoise.options import QAT_DATA_OPTIONS, option_help
from hfnoise.trainers.dataset_loading import CODE, EMBEDDED, resolve_model
from hfnoise.trainers.launch import finish, run_command

_NEEDED = {
    "model_name_or_path": f"a Hub id, a folder, or {EMBEDDED}",
    "dataset_name": f"a Hub id, a local file or folder, {EMBEDDED} or {CODE}",
}


@dataclass
class QATScriptArguments(ScriptArguments):
    """[`~trl.ScriptArguments`] with what language modelling on texts needs.

    Args:
        text_column (`str`, defaults to `"text"`): of the dataset.
        block_size (`int`, defaults to `512`): tokens of a row, at least 2.
        from_scratch (`bool`, defaults to `False`): random weights in the place of the model's.
        sample_prompt (`str`, *optional*): print a continuation of it at the end, by the saved model and by the float
            one, with tokens per second.

    Raises:
        ValueError: for a block of less than 2 tokens.

    Example:
        >>> from hfnoise.trainers.launch_qat import QATScriptArguments
        >>> QATScriptArguments(dataset_name="hfnoise:docstrings", block_size=96).text_column
        'text'
    """

    text_column: str = field(default="text", metadata={"help": option_help(QAT_DATA_OPTIONS, "text_column")})
    block_size: int = field(default=512, metadata={"help": option_help(QAT_DATA_OPTIONS, "block_size")})
    from_scratch: bool = field(default=False, metadata={"help": option_help(QAT_DATA_OPTIONS, "from_scratch")})
    sample_prompt: str | None = field(default=None, metadata={"help": option_help(QAT_DATA_OPTIONS, "sample_prompt")})

    def __post_init__(self) -> None:
        super().__post_init__() if hasattr(super(), "__post_init__") else None
        check_option_types(self, QATScriptArguments)
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size!r}; a row has at least 2 tokens, one to predict.")


def train_quantized(arguments: Sequence[str]) -> int:
    """Train with quantised weights from a command line and return the exit code.

    Args:
        arguments (`Sequence[str]`): name of the method, then its options: those of [`~hfnoise.QATTrainingArguments`],
            [`QATScriptArguments`] and [`~trl.ModelConfig`].

    Raises:
        UsageError: for options, data or a model that cannot be trained; before anything is trained.
    """
    return run_command(arguments, _types, _train, _NEEDED)


def _types(name: str) -> tuple[type, ...]:
    from trl import ModelConfig

    from hfnoise.trainers.qat_config import QATTrainingArguments

    return QATScriptArguments, QATTrainingArguments, ModelConfig


def _train(name: str, script: Any, training: Any, model: Any) -> None:
    try:
        trainer, base = _trainer(script, training, model)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    finish(trainer, training, script)
    if script.sample_prompt and trainer.is_world_process_zero():
        from hfnoise.trainers.qat_sample import print_samples

        print_samples(
            training.output_dir, base.to(trainer.model.device), trainer.processing_class, script.sample_prompt
        )


def _trainer(script: Any, training: Any, given: Any) -> tuple[Any, Any]:
    """Return the Trainer, and a copy of the float model if a sample is wanted."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    from hfnoise.trainers.qat import QATTrainer
    from hfnoise.trainers.qat_data import load_texts, text_blocks

    if given.use_peft:
        raise ValueError("use_peft: `hfnoise qat` trains all weights. For adapters use QATSFTTrainer in Python.")
    if given.load_in_4bit or given.load_in_8bit:
        raise ValueError(
            "load_in_4bit and load_in_8bit are of bitsandbytes, whose weights cannot be trained; use --bits."
        )
    check_writable(training.output_dir)
    train, held_out = load_texts(script)
    name = resolve_model(given.model_name_or_path)
    common = {"revision": given.model_revision}
    tokenizer = AutoTokenizer.from_pretrained(name, **common)
    set_seed(training.seed)
    options = {"attn_implementation": given.attn_implementation, "dtype": given.dtype}
    if script.from_scratch:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, **common), **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, **common, **options)
    base = copy.deepcopy(model) if script.sample_prompt else None
    rows = [
        None if texts is None else text_blocks(texts, tokenizer, script.text_column, script.block_size)
        for texts in (train, held_out)
    ]
    trainer = QATTrainer(
        model, args=training, train_dataset=rows[0], eval_dataset=rows[1], processing_class=tokenizer
    )  # fmt: skip
    return trainer, base
