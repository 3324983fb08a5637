"""The card of a dataset of noise pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch

from hfnoise.cards import CardFacts, Metric, base_of, embedded_name, rate
from hfnoise.citations import GOLDEN_NOISE_BIBTEX

_TAGS = ["diffusers", "golden-noise", "hfnoise"]


def write_card(folder: Path, pairs: datasets.Dataset, settings: dict[str, Any], pipe: Any) -> None:
    """Write `README.md` of a folder of pairs.

    Args:
        folder (`Path`): of the dataset.
        pairs (`datasets.Dataset`): what it holds.
        settings (`dict`): of the collection.
        pipe (`DiffusionPipeline`): that drew them.
    """
    base = base_of(pipe.config.get("_name_or_path"))
    path = pipe.config.get("_name_or_path") or ""
    is_embedded = bool(path) and embedded_name(path) is not None
    imports = "from hfnoise.worlds.digits_checkpoints import checkpoint_path\n" if is_embedded else ""
    source = f'checkpoint_path("{Path(path).name}")' if is_embedded else f'"{base.hub_id or path or "YOUR-PIPELINE"}"'
    rows = [(name, f"`{settings[name]}`") for name in ("refiner", "verifier") if settings[name]]
    rows += [(name.replace("_", " "), str(settings[name])) for name in ("prompts", "noises_per_prompt")]
    CardFacts(
        name=folder.name,
        lead=(
            f"{len(pairs)} pairs of noise and golden noise ([arXiv 2411.09502](https://huggingface.co/papers/2411.09502))"
            f" of {base.name}, for networks that turn noise into noise that suits a prompt better. Made with "
            "[hfnoise](https://pypi.org/project/hfnoise)."
        ),
        method="golden-noise",
        base=base,
        library_name="datasets",
        tags=_TAGS,
        metadata={
            "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}]
        },
        block={"pairs": len(pairs), **{name: settings[name] for name in _FACTS if settings[name] is not None}},
        noise=[("pairs", str(len(pairs))), *rows],
        noise_note=(
            "The noise of a row is drawn again from its seed, to the bit; only what golden noise adds to it is stored."
        ),
        seeds=[("seed (each pair has its own, in the column `seed`)", str(settings["seed"]))],
        settings=[("pipeline", f"`{settings['pipeline']}`"), ("hash of its weights", f"`{settings['weights']}`")]
        + [(f"`{name}`", value) for name, value in settings["call"].items()],
        snippet=(
            "from datasets import load_dataset\nfrom diffusers import DiffusionPipeline\n\n"
            f"from hfnoise import NoisePairRows\n{imports}\npipe = DiffusionPipeline.from_pretrained({source})\n"
            f'rows = NoisePairRows.from_pairs(load_dataset("{folder.name}", split="train"), pipe)\n'
            "print(rows.diagnose())"
        ),
        metrics=_metrics(pairs),
        results_note=(
            "Scores of the verifier that was given. Where pairs are chosen by it, expect less of another one."
        ),
        citation=GOLDEN_NOISE_BIBTEX.strip(),
    ).render_dataset("noise_pairs.md").save(folder / "README.md")


_FACTS = ("refiner", "verifier", "noises_per_prompt", "seed")


def _metrics(pairs: datasets.Dataset) -> list[Metric]:
    if "score_golden" not in pairs.column_names:
        return []
    scores = {name: torch.tensor(pairs[f"score_{name}"][:], dtype=torch.float64) for name in ("noise", "golden")}
    better = float((scores["golden"] > scores["noise"]).double().mean())
    return [
        *[
            Metric(f"mean score of images from {name}", f"{float(one.mean()):.4g}", _error(one))
            for name, one in scores.items()
        ],
        rate("pairs whose golden noise is better", better, len(pairs), "pairs"),
    ]


def _error(scores: torch.Tensor) -> str:
    count = len(scores)
    if count < 2:
        return "one pair"
    return f"± {float(scores.std()) / count**0.5:.2g} (standard error of {count} pairs)"
