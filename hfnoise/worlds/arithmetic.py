"""Sums with reasoning traces: prompts such as `7+5-9=` whose answers can be checked, and a tiny model that thinks.

The model (`model_path`) writes in the format of DeepSeek-R1, `<think>\\n{trace}\\n</think>\\n\\n{answer}`, or answers
at once after an empty trace. Its traces ramble, slip and correct themselves, so that they are right more often than
not and vary in length and quality: preference optimisation has something to win, and traces bring variance.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from hfnoise.preference.traces import EMPTY_TRACE, TRACE_START, split_trace
from hfnoise.worlds.arithmetic_traces import terms

if TYPE_CHECKING:
    from datasets import Dataset

MODEL_FOLDER = "arithmetic-llama"
PAIRS_FOLDER = "arithmetic-trace-pairs"
# Longest completion: three steps, each with a filler, a slip and its correction, take 103 tokens.
MAX_NEW_TOKENS = 128
LARGEST_NUMBER = 12

SPLITS = ("train", "validation")
MODES = ("think", "nothink")


@dataclass(frozen=True)
class TraceRecipe:
    """Settings of a preference run on the trace pairs of this world that takes about a minute on a CPU.

    Args:
        train_size (`int`): training pairs.
        eval_questions (`int`): held-out sums for [`accuracy`].
        beta (`float`): of the DPO loss.
        learning_rate (`float`): peak, linear decay.
        num_train_epochs (`int`): passes over the training pairs.
        per_device_train_batch_size (`int`): pairs per step.
        max_length (`int`): tokens of prompt, trace and answer together; no pair is cut.
    """

    train_size: int = 3000
    eval_questions: int = 1000
    beta: float = 4.0
    learning_rate: float = 3e-4
    num_train_epochs: int = 2
    per_device_train_batch_size: int = 32
    max_length: int = 160


# Measured with NoiseDPOTrainer and loss_type="sigmoid" on 1000 validation sums, at temperature 1 (standard error of a
# number 0.016; the recipe was chosen on these sums), then greedy; "think" are plain text pairs of the columns
# `chosen` and `rejected`, "union" adds those without a trace, with the empty trace in the prompt.
#   trained on         think           without a trace
#   nothing            .535, .966      .473, .780
#   think, seed 0      .614, .958      .355, .435
#   think, seed 1      .620, .958      .424, .597
#   union, seed 0      .626, .955      .509, .803
# One run on the think pairs: 188 steps, 50 s of one core that was shared. A beta of 0.1, usual for large models, is
# too weak a tie to the reference here: at 1e-4 both numbers fall (.385, .715).
TRACE_RECIPE = TraceRecipe()


def prompts(split: str = "train", count: int = 1000, seed: int = 0) -> list[str]:
    """Return distinct sums of three or four numbers from 1 to 12, such as "7+5-9=".

    No total on the way, from left to right, is below 0.

    Args:
        split (`str`, defaults to `"train"`): `"train"` (7 of 8 sums, by a hash of the text) or `"validation"`.
        count (`int`, defaults to `1000`): from 1 to 10000; a smaller count gives the first ones of a larger.
        seed (`int`, defaults to `0`): at least 0.

    Raises:
        ValueError: for an unknown split, or a count or seed out of range.

    Example:
        >>> from hfnoise.worlds.arithmetic import prompts
        >>> len(set(prompts("validation", 50)))
        50
    """
    check_split(split)
    check_integer("count", count, 1, 10_000)
    check_integer("seed", seed, 0)
    random = Random(f"{split} {seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        prompt = random_prompt(random)
        if split_of(prompt) == split:
            found[prompt] = None
    return list(found)


def random_prompt(random: Random) -> str:
    """Return a sum of either split."""
    total = random.randint(1, LARGEST_NUMBER)
    prompt = str(total)
    for _ in range(random.choice((2, 3))):
        term = random.randint(1, LARGEST_NUMBER) * random.choice((1, -1))
        term = abs(term) if total + term < 0 else term
        total += term
        prompt += f"{term:+d}"
    return f"{prompt}="


def split_of(prompt: str) -> str:
    """Return the split that a sum belongs to; the model was trained on no sum of the validation split."""
    return "validation" if hashlib.sha256(prompt.encode()).digest()[0] < 32 else "train"


def answer_of(prompt: str) -> int:
    """Return the right answer.

    Raises:
        ValueError: if the prompt is no sum of this world.

    Example:
        >>> from hfnoise.worlds.arithmetic import answer_of
        >>> answer_of("7+5-9=")
        3
    """
    return sum(terms(prompt))


def reward(prompt: Any, completion: str) -> float:
    """Return 1.0 if what follows the last `</think>` is the right answer and nothing else, 0.0 otherwise.

    Args:
        prompt (`str` or `list[dict]`): a sum, or a conversation whose last message is one.
        completion (`str`): with or without a trace. A trace that is never closed has no answer.

    Example:
        >>> from hfnoise.worlds.arithmetic import reward
        >>> reward("7+5-9=", "<think>\\n7+5=11\\n</think>\\n\\n3")
        1.0
    """
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return float(split_trace(completion)[1] == str(answer_of(question)))


def model_path() -> str:
    """Return the folder of the tiny reasoning Llama of this world, for `from_pretrained`.

    Raises:
        FileNotFoundError: if the weights are not there; the message holds the command that trains them.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from hfnoise.worlds.arithmetic import model_path
        >>> model = AutoModelForCausalLM.from_pretrained(model_path())
    """
    folder = Path(str(files("hfnoise.model_cards"))) / MODEL_FOLDER
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no weights in {folder}. Train them in a few minutes with: "
            f"python -m hfnoise.worlds.arithmetic_model --output_dir {folder}"
        )
    return str(folder)


def trace_pairs(split: str = "train", count: int | None = None, seed: int = 0) -> Dataset:
    """Return preference pairs with traces and without, sampled from the model of this world and scored by [`reward`].

    They are shipped; `python -m hfnoise.worlds.arithmetic_pairs` makes them, with [`make_trace_pairs`]. Their prompts
    are those that the model answers now rightly and now wrongly in both modes, harder ones than [`prompts`] gives.

    Args:
        split (`str`, defaults to `"train"`): `"train"` or `"validation"`.
        count (`int`, *optional*): number of pairs; all of the split by default.
        seed (`int`, defaults to `0`): of the order; a smaller count gives the first pairs of a larger one.

    Returns:
        `datasets.Dataset` with the text columns `prompt`, `chosen`, `rejected`, `chosen_nothink`, `rejected_nothink`
        and the reward of each answer.

    Raises:
        ValueError: for an unknown split, or a count or seed out of range.
        FileNotFoundError: if the file is not there; the message holds the command that makes it.

    Example:
        >>> from hfnoise.worlds.arithmetic import reward, trace_pairs
        >>> pairs = trace_pairs("validation", 3)
        >>> [reward(row["prompt"], row["chosen"]) - reward(row["prompt"], row["rejected"]) for row in pairs]
        [1.0, 1.0, 1.0]
    """
    from datasets import Dataset
    from pyarrow import parquet

    check_split(split)
    check_integer("seed", seed, 0)
    folder = Path(str(files("hfnoise.model_cards"))) / PAIRS_FOLDER
    path = folder / "data" / f"{split}-00000-of-00001.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"no pairs at {path}. Make them in a few minutes with: "
            f"python -m hfnoise.worlds.arithmetic_pairs --output_dir {folder}"
        )
    pairs = Dataset(parquet.read_table(path))
    if count is not None:
        check_integer("count", count, 1, len(pairs))
    return pairs.select(Random(seed).sample(range(len(pairs)), len(pairs))[:count])


def accuracy(
    model: Any,
    tokenizer: Any,
    questions: list[str],
    mode: str = "think",
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> float:
    """Return the share of sums that a model answers rightly, one sampled completion each.

    The sampled numbers are the same for every model, so two models can be compared sum by sum.

    Args:
        model (`PreTrainedModel`): the model of this world, perhaps trained further.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        questions (`list[str]`): from [`prompts`].
        mode (`str`, defaults to `"think"`): `"think"`, or `"nothink"` for an empty trace.
        temperature (`float`, defaults to `1.0`): 0 for the likeliest token.
        seed (`int`, defaults to `0`): of the samples.
        batch_size (`int`, defaults to `256`): completions at once.

    Raises:
        ValueError: for an unknown mode, no questions, or a setting out of range.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from hfnoise.worlds.arithmetic import accuracy, model_path, prompts
        >>> model = AutoModelForCausalLM.from_pretrained(model_path())
        >>> tokenizer = AutoTokenizer.from_pretrained(model_path())
        >>> 0.3 < accuracy(model, tokenizer, prompts("validation", 100)) < 0.9
        True
    """
    from hfnoise.preference.hf_trace_sampling import SamplingSettings, sample_completions

    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if not questions:
        raise ValueError("questions is empty: give at least one sum, for instance prompts('validation', 500).")
    start = TRACE_START if mode == "think" else EMPTY_TRACE
    settings = SamplingSettings(MAX_NEW_TOKENS, temperature=temperature, seed=seed, batch_size=batch_size)
    prefixes = [question + start for question in questions]
    completions = sample_completions(model, tokenizer, prefixes, 1, settings, description=f"accuracy ({mode})")
    right = [
        completion.finished and reward(question, start + completion.text) == 1.0
        for question, [completion] in zip(questions, completions, strict=True)
    ]
    return sum(right) / len(right)


def check_split(split: str) -> None:
    """Raise ValueError if there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise ValueError if a value is no integer from `least` to `most`."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not fits or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {limit}, got {value!r}.")
