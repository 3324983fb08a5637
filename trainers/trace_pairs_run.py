"""`hfnoise make-trace-pairs`: sample, score and save the pairs that BVPO trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from hfnoise.errors import UsageError
from hfnoise.folders import check_writable
from hfnoise.option_types import check_least, check_option_types
from hfnoise.trainers.command_line import parse
from hfnoise.trainers.dataset_loading import ARITHMETIC, load_any, resolve_model
from hfnoise.trainers.trace_pairs import make_trace_pairs, trace_report
from hfnoise.trainers.trace_pairs_saving import save_trace_pairs
from hfnoise.worlds import arithmetic


@dataclass
class TracePairsArguments:
    """Model, prompts, reward and sampling of `hfnoise make-trace-pairs`.

    Args:
        model_name_or_path (`str`): Hub id, folder, or `hfnoise:arithmetic`.
        dataset_name (`str`): dataset with a column of prompts: Hub id, local file or folder, or `hfnoise:arithmetic`.
        reward (`str`): `arithmetic`, or `module:function` given (prompt, answer).
    """

    model_name_or_path: str = field(metadata={"help": "Reasoning model: Hub id, folder, or hfnoise:arithmetic."})
    dataset_name: str = field(metadata={"help": "Prompts: Hub id, file, folder, or hfnoise:arithmetic."})
    reward: str = field(
        metadata={"help": "'arithmetic', or 'module:function'; it is given prompt and answer and returns a number."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to take the prompts from."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of texts or conversations."})
    max_prompts: int | None = field(default=None, metadata={"help": "Take this many prompts, from the first."})
    output_dir: str = field(default="trace_pairs", metadata={"help": "Folder for the pairs and their card."})
    samples: int = field(default=5, metadata={"help": "Answers per prompt and mode."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest trace and answer, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling, above 0."})
    top_p: float = field(default=1.0, metadata={"help": "Share of probability that is sampled from."})
    top_k: int = field(default=0, metadata={"help": "Number of tokens that are sampled from; 0: all."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    batch_size: int = field(default=16, metadata={"help": "Answers sampled at once."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})

    def __post_init__(self) -> None:
        check_option_types(self, TracePairsArguments)
        check_least(self, 1, "max_prompts", "samples", "max_new_tokens", "batch_size")


def main(arguments: Sequence[str]) -> int:
    """Make pairs from a command line; writes Parquet files and a dataset card."""
    (given,) = parse("hfnoise make-trace-pairs", [TracePairsArguments], arguments)
    try:
        check_writable(given.output_dir)
        reward_fn = reward_function(given.reward)
        pairs = make_trace_pairs(
            _model(given), _prompts(given), reward_fn, given.samples, max_new_tokens=given.max_new_tokens,
            temperature=given.temperature, top_p=given.top_p, top_k=given.top_k, seed=given.seed,
            batch_size=given.batch_size,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    folder = save_trace_pairs(pairs, given.output_dir)
    report = trace_report(pairs)
    print(f"{report['pairs']} pairs from {report['prompts']} prompts are in {folder}")
    for mode in ("think", "nothink"):
        print(f"{mode}: {report[mode]}")
    return 0


def reward_function(name: str) -> Callable[[Any, str], float]:
    """Return the reward that a command line names.

    Args:
        name (`str`): `arithmetic`, or `module:function` of an importable module.

    Raises:
        ValueError: if there is no such function.

    Example:
        >>> from hfnoise.trainers.trace_pairs_run import reward_function
        >>> reward_function("arithmetic")("1+1=", "2")
        1.0
    """
    if name == "arithmetic":
        return arithmetic.reward
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function) if module and function else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"reward must be 'arithmetic' or 'module:function', got {name!r}.")
    return found


def _model(given: TracePairsArguments) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_model(given.model_name_or_path), dtype="auto")
    device = None if given.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return model if device is None else model.to(device)


def _prompts(given: TracePairsArguments) -> list[Any]:
    if given.max_prompts is not None and given.max_prompts < 1:
        raise ValueError(f"max_prompts must be at least 1, got {given.max_prompts}.")
    if given.dataset_name == ARITHMETIC:
        # All its sums: the dataset of that name holds those that have given pairs.
        return arithmetic.prompts(given.dataset_split, given.max_prompts or 1000)
    splits = load_any(given.dataset_name, given.dataset_config)
    if given.dataset_split not in splits:
        raise ValueError(
            f"dataset {given.dataset_name!r} has no split {given.dataset_split!r}; it has {sorted(splits)}."
        )
    dataset = splits[given.dataset_split]
    if given.prompt_column not in dataset.column_names:
        raise ValueError(
            f"dataset {given.dataset_name!r} has no column {given.prompt_column!r}; it has {dataset.column_names}. "
            "Name one with --prompt_column."
        )
    return list(dataset[given.prompt_column])[: given.max_prompts]
