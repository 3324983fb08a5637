"""The card of a dataset of noise pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import DatasetCard, DatasetCardData

from hfnoise.cards import command_line, library_versions, render_card

_TAGS = ["diffusers", "golden-noise", "hfnoise"]


def write_card(folder: Path, pairs: datasets.Dataset, settings: dict[str, Any]) -> None:
    """Write `README.md` of a folder of pairs.

    Args:
        folder (`Path`): of the dataset.
        pairs (`datasets.Dataset`): what it holds.
        settings (`dict`): of the collection.
    """
    rows = [(name, f"`{settings[name]}`") for name in ("pipeline", "refiner", "verifier") if settings[name]]
    rows += [(name, str(settings[name])) for name in ("prompts", "noises_per_prompt", "seed")]
    rows += [(f"`{name}`", value) for name, value in settings["call"].items()]
    if "score_golden" in pairs.column_names:
        scores = {name: torch.tensor(pairs[f"score_{name}"][:]) for name in ("noise", "golden")}
        better = float((scores["golden"] > scores["noise"]).float().mean())
        rows += [(f"mean score of images from {name}", f"{float(one.mean()):.4g}") for name, one in scores.items()]
        rows += [("pairs whose golden noise is better", f"{better:.1%}")]
    data = DatasetCardData(
        tags=_TAGS,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    content = render_card(
        "noise_pairs.md", data, name=folder.name, count=len(pairs), rows=rows, command=command_line(),
        versions=library_versions(),
    ).content  # fmt: skip
    DatasetCard(content).save(folder / "README.md")
