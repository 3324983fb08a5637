"""Write trace pairs as a Hub folder: Parquet files and a dataset card that says how they were sampled."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData

from hfnoise.cards import library_versions, render_card
from hfnoise.trainers.trace_pairs import MODES, trace_report

_TAGS = ["bvpo", "hfnoise", "preference", "reasoning", "trl"]
_MODE_NAMES = {"think": "with trace", "nothink": "without trace"}
# Upper ends of the Hub's size categories.
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))

_CITATION = """\
@article{zhu2025noisy,
    title   = {{From Noisy Traces to Stable Gradients: Bias-Variance Optimized Preference Optimization for Aligning
               Large Reasoning Models}},
    author  = {Mingkang Zhu and Xi Chen and Bei Yu and Hengshuang Zhao and Jiaya Jia},
    journal = {arXiv preprint arXiv:2510.05095},
    year    = {2025},
    url     = {https://arxiv.org/abs/2510.05095},
}"""


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
    data = DatasetCardData(
        tags=_TAGS,
        task_categories=["text-generation"],
        size_categories=[next((label for limit, label in _SIZES if sum(sizes.values()) < limit), "n>1M")],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{_file_name(split)}"} for split in splits],
            }
        ],
        **({"license": license} if license else {}),
    )
    is_text = isinstance(first[0]["prompt"], str)
    content = render_card(
        "trace_pairs.md",
        data,
        name=name,
        pair_counts=", ".join(f"{size} pairs in the split `{split}`" for split, size in sizes.items()),
        model=_model_text(report["model"]),
        reward=report["reward"],
        prompt_kind="text" if is_text else "messages; the answers are messages too",
        repository=name,
        sections=[(split, _rows(part, sizes[split])) for split, part in reports.items()],
        command=_command(),
        versions=library_versions(),
        citation=_CITATION,
    ).content
    return DatasetCard(content)


def _file_name(split: str) -> str:
    return f"{split}-00000-of-00001.parquet"


def _command() -> str:
    """Return the command of this process, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set by `python -m`
    start = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name or "python"]
    return shlex.join([*start, *sys.argv[1:]])


def _model_text(path: str) -> str:
    """Return how the card calls the model; the folder of a local one is nobody's business, its name is enough."""
    if not path:
        return "a local model"
    if Path(path).is_dir():
        return f"the local model `{Path(path).name}`"
    return f"[{path}](https://huggingface.co/{path})"


def _rows(report: dict[str, Any], size: int) -> list[tuple[str, str]]:
    rows = [("prompts", str(report["prompts"])), ("pairs made", str(report["pairs"])), ("pairs here", str(size))]
    rows.append(("answers per prompt and mode", str(report["samples"])))
    rows += [(name, str(value)) for name, value in report["sampling"].items() if name != "batch_size"]
    for mode in MODES:
        counts = report[mode]
        rows += [
            (f"mean reward {_MODE_NAMES[mode]}", f"{counts['mean_reward']:.3f}"),
            (f"cut {_MODE_NAMES[mode]}", f"{counts['cut']} of {counts['completions']}"),
            (f"malformed {_MODE_NAMES[mode]}", f"{counts['malformed']} of {counts['completions']}"),
            (f"prompts without a difference {_MODE_NAMES[mode]}", str(counts["no_difference"])),
        ]
    return rows
