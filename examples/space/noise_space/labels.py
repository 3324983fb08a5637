"""Finds flipped preference labels: trains on some pairs, and looks at the margins of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

import hfnoise
from hfnoise.trainers.audit_labels import suspect_rows
from hfnoise.trainers.dataset_loading import load_any, resolve_model
from hfnoise.worlds.docstrings import NAME as DOCSTRINGS
from hfnoise.worlds.docstrings import preference_pairs
from noise_space.inputs import LARGEST_SEED, number, repository, text, whole_number
from noise_space.notes import collected_notes
from noise_space.refusals import REFUSALS, in_words

# Of the docstrings there are hardly more held-out pairs, and a minute of one core trains on no more.
FEWEST_PAIRS, MOST_PAIRS = 50, 1200
SUSPECTS = 50
# From 0.5 on the labels say nothing, or the opposite.
LARGEST_SHARE = 0.45
_COLUMNS = ("prompt", "chosen", "rejected")
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Audit:
    """What the second page asks for, checked; the defaults suit the docstrings world.

    Args:
        dataset, model (`str`): `hfnoise:docstrings`, a Hub id, or a file or folder.
        split (`str`): of a dataset that is named.
        pairs (`int`): that are looked at; as many others are trained on.
        flip_share (`float`): of the labels, flipped before anything else.

    Raises:
        ValueError: for what cannot be run.
    """

    dataset: str = DOCSTRINGS
    model: str = DOCSTRINGS
    split: str = "train"
    flip_share: float = 0.2
    seed: int = 0
    pairs: int = 1000
    beta: float = 2.0
    learning_rate: float = 2e-4
    batch_size: int = 32
    max_length: int = 96

    def __post_init__(self) -> None:
        checked = {
            "dataset": _name(self.dataset, "The dataset"),
            "model": _name(self.model, "The model"),
            "split": text(self.split, "The split"),
            "flip_share": number(self.flip_share, "The share of flipped labels", 0.0, LARGEST_SHARE),
            "seed": whole_number(self.seed, "The seed", 0, LARGEST_SEED),
            "pairs": whole_number(self.pairs, "The number of pairs", FEWEST_PAIRS, MOST_PAIRS),
            "beta": number(self.beta, "beta", 1e-3, 100.0),
            "learning_rate": number(self.learning_rate, "The learning rate", 1e-9, 1.0),
            "batch_size": whole_number(self.batch_size, "The batch size", 1, 256),
            "max_length": whole_number(self.max_length, "The longest pair in tokens", 8, 4096),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return the pairs to train on and those to look at, with labels flipped.

        Raises:
            ValueError: if the dataset cannot be read, or has too few pairs or other columns.
        """
        if self.dataset == DOCSTRINGS:
            both = [preference_pairs(split, size=self.pairs) for split in ("train", "validation")]
        else:
            rows = _first_rows(self.dataset, self.split, 2 * self.pairs)
            # Every other one: what comes later in a dataset is often of another kind.
            both = [Dataset.from_list(rows[start::2]) for start in (0, 1)]
        train, audited = (hfnoise.flip_labels(pairs, self.flip_share, self.seed) for pairs in both)
        return train, audited

    def python(self) -> str:
        """Return a script that does the same."""
        if self.dataset == DOCSTRINGS:
            load = [
                "from hfnoise.worlds.docstrings import model_path, preference_pairs\n",
                f'train = preference_pairs("train", size={self.pairs})',
                f'audited = preference_pairs("validation", size={self.pairs})',
            ]
        else:
            load = [
                "from datasets import Dataset",
                "from hfnoise.trainers.dataset_loading import load_any",
                *(["from hfnoise.worlds.docstrings import model_path"] if self.model == DOCSTRINGS else []),
                f"\nrows = list(load_any({self.dataset!r}, streaming=True)[{self.split!r}].take({2 * self.pairs}))",
                f"rows = [{{name: row[name] for name in {_COLUMNS!r} if name in row}} for row in rows]",
                "train, audited = Dataset.from_list(rows[0::2]), Dataset.from_list(rows[1::2])",
            ]
        flips = f"flip_labels({{}}, {self.flip_share:g}, seed={self.seed})"
        options = "".join(f"        {name}={value!r},\n" for name, value in self.settings().items())
        return "\n".join(
            [
                "from hfnoise import RobustDPOConfig, RobustDPOTrainer, flip_labels",
                *load,
                f"audited = {flips.format('audited')}",
                "trainer = RobustDPOTrainer(",
                f"    {'model_path()' if self.model == DOCSTRINGS else repr(self.model)},",
                f'    args=RobustDPOConfig(\n        "out",\n{options}    ),',
                f"    train_dataset={flips.format('train')},",
                "    eval_dataset=audited,",
                ")",
                "trainer.train()",
                "print(trainer.flip_rate_estimate)",
                'suspects = trainer.export_suspects(audited).sort("margin")',
            ]
        )

    def settings(self) -> dict[str, Any]:
        """Return the options of `RobustDPOConfig`."""
        cpu = not torch.accelerator.is_available()
        return {
            "beta": self.beta, "learning_rate": self.learning_rate, "num_train_epochs": 1, "seed": self.seed,
            "per_device_train_batch_size": self.batch_size, "per_device_eval_batch_size": self.batch_size,
            "max_length": self.max_length, "use_cpu": cpu, "bf16": not cpu, "activation_checkpointing": not cpu,
            "drop_invalid_pairs": True, "eval_strategy": "no", "save_strategy": "no", "report_to": "none",
        }  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What an audit found.

    Args:
        scored (`datasets.Dataset`): the pairs that were looked at, with `margin`, `p_flip`, and `flipped` where some
            were flipped here.
        estimate ([`hfnoise.FlipRateEstimate`]): of the flip rate.
        notes (`tuple[str, ...]`): what else there is to know.
    """

    scored: Dataset
    estimate: Any
    notes: tuple[str, ...]

    @property
    def margins(self) -> torch.Tensor:
        """Of the pairs, signed by the recorded label."""
        return torch.tensor(self.scored["margin"][:])

    @property
    def flipped(self) -> torch.Tensor | None:
        """Which labels were flipped here; `None` if none were."""
        flipped = torch.tensor(self.scored["flipped"][:])
        return flipped if bool(flipped.any()) else None

    def suspects(self, count: int = SUSPECTS) -> list[list[str]]:
        """Return the pairs whose labels look flipped, worst first: rank, p_flip, margin, flipped or not, texts."""
        flipped = self.scored["flipped"][:]
        rows = suspect_rows(self.scored, count)
        known = ["yes" if flipped[int(row[0])] else "no" for row in rows]
        numbered = enumerate(zip(rows, known, strict=True), 1)
        return [[str(rank), *row[1:3], said, *row[3:]] for rank, (row, said) in numbered]

    def verdict(self) -> str:
        """Return what was found, as Markdown."""
        estimate, flipped = self.estimate, self.flipped
        if estimate.refused:
            lines = [f"### Flip rate: not estimated\n{estimate.reason}"]
        else:
            low, high = estimate.interval
            lines = [
                f"### Estimated flip rate: {100 * estimate.flip_rate:.1f} %",
                f"95 % interval {100 * low:.1f} to {100 * high:.1f} %, from {estimate.count} pairs that "
                "the model was not trained on.",
            ]
        if flipped is None:
            lines.append("No label was flipped here, so nothing says which suspects are right: read them.")
            return "\n\n".join(lines)
        share, count = float(flipped.float().mean()), min(SUSPECTS, len(flipped))
        hits = sum(row[3] == "yes" for row in self.suspects(count))
        lines.append(
            f"Flipped here: **{100 * share:.1f} %** of these pairs. Of the {count} most suspect labels **{hits}** "
            f"were flipped; {share * count:.0f} would be chance."
        )
        return "\n\n".join(lines)


class _Steps(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell how far the training is; scoring takes about a third of the time."""
        self.progress(0.65 * state.global_step / state.max_steps, f"training, step {state.global_step}")


def find_flips(audit: Audit, progress: Progress) -> Found:
    """Return what an audit finds.

    Args:
        audit ([`Audit`]): what to do.
        progress (`Callable`): is told a share of the work, and what is being done.

    Raises:
        ValueError: if the dataset or the model cannot be used.
    """
    try:
        with TemporaryDirectory() as folder, collected_notes() as notes:
            progress(0.0, "reading the pairs")
            train, audited = audit.datasets()
            progress(0.0, "loading the model")
            trainer = hfnoise.RobustDPOTrainer(
                resolve_model(audit.model),
                args=hfnoise.RobustDPOConfig(
                    folder, **audit.settings(), disable_tqdm=True, logging_strategy="no",
                    model_init_kwargs={"use_safetensors": True},
                ),
                train_dataset=train, eval_dataset=audited, callbacks=[_Steps(progress)],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)  # it takes the place of the bar
            trainer.train()
            progress(0.85, "scoring the pairs")
            scored = trainer.export_suspects(audited)
    except REFUSALS as error:
        raise ValueError(in_words(error)) from error
    if trainer.flip_rate_estimate is None:
        raise ValueError(" ".join(notes) or "the flip rate was not estimated.")
    return Found(scored, trainer.flip_rate_estimate, tuple(notes))


def _name(value: Any, what: str) -> str:
    return DOCSTRINGS if value == DOCSTRINGS else repository(value, what)


def _first_rows(name: str, split: str, count: int) -> list[dict[str, Any]]:
    # Streaming: neither disk nor memory hold more of a dataset than what is looked at.
    splits = load_any(name, streaming=True)
    if split not in splits:
        raise ValueError(f"{name!r} has no split {split!r}; it has {', '.join(sorted(splits))}.")
    rows = [{key: row[key] for key in _COLUMNS if key in row} for row in splits[split].take(count)]
    if len(rows) < 2 * FEWEST_PAIRS:
        raise ValueError(f"{name!r} has {len(rows)} pairs in {split!r}; at least {2 * FEWEST_PAIRS} are needed.")
    return rows
