"""Make the trace pairs of the arithmetic world, as they are shipped, with the shipped model.

One command, some minutes on 2 CPU cores::

    python -m hfnoise.worlds.arithmetic_pairs --output_dir model_cards/arithmetic-trace-pairs
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from hfnoise.worlds.arithmetic import MAX_NEW_TOKENS, PAIRS_FOLDER, model_path, prompts, reward

PROMPTS = {"train": 4000, "validation": 800}
_BATCH_SIZE = 256


def build(output_dir: str | Path, counts: dict[str, int] | None = None, seed: int = 0) -> dict[str, int]:
    """Sample the pairs of every split and save them with their card.

    Args:
        output_dir (`str` or `Path`): folder to write.
        counts (`dict[str, int]`, *optional*): prompts of each split; those of the shipped pairs by default.
        seed (`int`, defaults to `0`): of prompts and samples.

    Returns:
        Number of pairs of each split.

    Example:
        >>> from hfnoise.worlds.arithmetic_pairs import build
        >>> build("my-pairs", {"train": 40})["train"] > 0
        True
    """
    # By name: the core reaches the trainers no other way.
    make_trace_pairs = import_module("hfnoise.trainers.trace_pairs").make_trace_pairs
    save_trace_pairs = import_module("hfnoise.trainers.trace_pairs_saving").save_trace_pairs
    splits = {
        split: make_trace_pairs(
            model_path(), prompts(split, count, seed), reward, max_new_tokens=MAX_NEW_TOKENS, seed=seed,
            batch_size=_BATCH_SIZE,
        )
        for split, count in (counts or PROMPTS).items()
    }  # fmt: skip
    save_trace_pairs(splits, output_dir, name=PAIRS_FOLDER, license="apache-2.0")
    return {split: len(pairs) for split, pairs in splits.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `python -m hfnoise.worlds.arithmetic_pairs --help` shows the options."""
    parser = argparse.ArgumentParser(
        prog="python -m hfnoise.worlds.arithmetic_pairs",
        description="Sample the trace pairs of the arithmetic world with its shipped model.",
    )
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    build(options.output_dir, seed=options.seed)


if __name__ == "__main__":
    main()
