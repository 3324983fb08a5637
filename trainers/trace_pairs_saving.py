"""Write trace pairs as a Hub folder: Parquet files and a dataset card that says how they were sampled."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCard

from hfnoise.cards import CardFacts, Metric, base_of, number
from hfnoise.citations import BVPO_BIBTEX
from hfnoise.trainers.trace_pairs import MODES, trace_report

_TAGS = ["bvpo", "hfnoise", "preference", "reasoning", "trl"]
_MODE_NAMES = {"think": "with trace", "nothink": "without trace"}
# Upper ends of the Hub's size categories.
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def save_trace_pairs(
    pairs: Dataset | dict[str, Dataset], folder: str | Path, name: str | None = None, license: str | None = None
) -> Path:
    """Write pairs and their card to a folder that `load_dataset(folder)` reads and that can be uploaded as it is.

    Args:
        pairs (`datasets.Dataset` or `dict[str, datasets.Dataset]`): from [`make_trace_pairs`], or by split; one alone
            is the split `train`.
        folder (`str` or `Path`): made if it is missing.
        name (`str`, *optional*): heading and repository in the card; the name of the folder by default.
        license (`str`, *optional*): identifier of the Hub, such as `apache-2.0`.

    Returns:
        The folder. `data/{split}-00000-of-00001.parquet` holds the pairs, `README.md` the card.

    Raises:
        ValueError: if there is no split, or the pairs do not come from `make_trace_pairs`.

    Example:
        >>> from hfnoise import make_trace_pairs
        >>> from hfnoise.trainers.trace_pairs_saving import save_trace_pairs
        >>> from hfnoise.worlds.arithmetic import model_path, prompts, reward
        >>> pairs = make_trace_pairs(model_path(), prompts("train", 30), reward, max_new_tokens=128, batch_size=150)
        >>> sorted(path.name for path in save_trace_pairs(pairs, "my-pairs").iterdir())
        ['README.md', 'data']
    """
    splits = pairs if isinstance(pairs, dict) else {"train": pairs}
    if not splits:
        raise ValueError("pairs holds no split: give at least one dataset.")
    card = trace_pairs_card(splits, name or Path(folder).name, license)
    target = Path(folder) / "data"
    target.mkdir(parents=True, exist_ok=True)
    # All beside their places and then renamed: a full disk leaves the pairs of an earlier save as they were.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as made:
        for split, dataset in splits.items():
            dataset.to_parquet(os.path.join(made, _file_name(split)))
        card.save(Path(made) / "README.md")
        for split in splits:
            os.replace(Path(made) / _file_name(split), target / _file_name(split))
        os.replace(Path(made) / "README.md", Path(folder) / "README.md")
    return Path(folder)


def trace_pairs_card(splits: dict[str, Dataset], name: str, license: str | None = None) -> DatasetCard:
    """Return the card: settings of sampling, counts, and reward per mode.

    Args:
        splits (`dict[str, datasets.Dataset]`): from [`make_trace_pairs`], by split.
        name (`str`): heading, and repository in the snippet.
        license (`str`, *optional*): identifier of the Hub.
    """
    reports = {split: trace_report(dataset) for split, dataset in splits.items()}
    first, report = next(iter(splits.values())), next(iter(reports.values()))
    sizes = {split: len(dataset) for split, dataset in splits.items()}
    base = base_of(report["model"])
    counts = ", ".join(f"{size} pairs in the split `{split}`" for split, size in sizes.items())
    seeds = dict.fromkeys(str(part["sampling"]["seed"]) for part in reports.values())
    card: DatasetCard = CardFacts(
        name=name,
        lead=(
            f"Preference pairs with reasoning traces and without: {counts}. Answers were sampled from {base.name} "
            f"and scored by the reward `{report['reward']}`; of the answers to a prompt in one mode the best is "
            "chosen and the worst is rejected. The format is that of BVPO "
            "([paper](https://huggingface.co/papers/2510.05095)); made with hfnoise."
        ),
        method="bvpo",
        base=base,
        library_name="datasets",
        tags=_TAGS,
        metadata={
            "task_categories": ["text-generation"],
            "size_categories": [next((label for limit, label in _SIZES if sum(sizes.values()) < limit), "n>1M")],
            "configs": [
                {
                    "config_name": "default",
                    "data_files": [{"split": split, "path": f"data/{_file_name(split)}"} for split in splits],
                }
            ],
            "license": license,
        },
        block={"sampling": report["sampling"], "reward": report["reward"]},
        noise=[row for split, part in reports.items() for row in _noise_rows(split, part)],
        noise_note=(
            "The noise of these pairs is that of sampling: an answer is right or wrong by the trace that was drawn, "
            "which is the variance that BVPO weighs against its bias."
        ),
        seeds=[("seed of sampling", ", ".join(seeds))],
        snippet=f'from datasets import load_dataset\n\npairs = load_dataset("{name}")',
        use_note=(
            "Chat templates of reasoning models drop the trace from a finished assistant turn: train with a Trainer "
            "that keeps it."
        ),
        metrics=[one for split, part in reports.items() for one in _metrics(split, part)],
        results_note="Mean reward of the answers that were sampled; a share where the reward is 0 or 1.",
        citation=BVPO_BIBTEX.strip(),
    ).render_dataset(
        "trace_pairs.md",
        prompt_kind="text" if isinstance(first[0]["prompt"], str) else "messages; the answers are messages too",
        sections=[(split, _rows(part, sizes[split])) for split, part in reports.items()],
    )
    return card


def _file_name(split: str) -> str:
    return f"{split}-00000-of-00001.parquet"


def _rows(report: dict[str, Any], size: int) -> list[tuple[str, str]]:
    rows = [("prompts", str(report["prompts"])), ("pairs made", str(report["pairs"])), ("pairs here", str(size))]
    rows.append(("answers per prompt and mode", str(report["samples"])))
    return rows + [(name, str(value)) for name, value in report["sampling"].items() if name != "batch_size"]


def _noise_rows(split: str, report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for mode in MODES:
        counts, kind = report[mode], f"{_MODE_NAMES[mode]}, {split}"
        rows += [
            (f"cut {kind}", f"{counts['cut']} of {counts['completions']}"),
            (f"malformed {kind}", f"{counts['malformed']} of {counts['completions']}"),
            (f"prompts without a difference {kind}", f"{counts['no_difference']} of {report['prompts']}"),
        ]
    return rows


def _metrics(split: str, report: dict[str, Any]) -> list[Metric]:
    spread = f"one seed, {report['samples']} answers to each of {report['prompts']} prompts"
    return [
        Metric(f"mean reward {_MODE_NAMES[mode]}, {split}", number(report[mode]["mean_reward"], 3), spread)
        for mode in MODES
    ]
