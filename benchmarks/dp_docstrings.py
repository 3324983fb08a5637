"""What privacy costs and what it buys, on the docstrings world: a public model is fine-tuned on private code.

The base model has read docstrings and no code. It is fine-tuned (LoRA) on code of the standard library in which
secretly chosen canaries, strings of random tokens, lie hidden: by `trl.SFTTrainer`, by `DPSFTTrainer` that clips and
adds no noise, and by `DPSFTTrainer` at several budgets. Shown are the perplexity on modules that nobody trained on,
the exposure of the canaries (how many bits of "was it in?" their losses give away), and the audit of every private
run.

    python -m hfnoise.benchmarks.dp_docstrings --output_dir docs/results
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from hfnoise.benchmarks import reporting
from hfnoise.benchmarks.dp_docstrings_runs import BASE, ORDINARY, Outcome, Settings, base_perplexity, run

CLIPPED = "clipped, no noise"
_NO_MEMORY = 1 / math.log(2)  # bits: mean of -log2 of a uniform number
_HEADER = ("", "perplexity", "exposure, bits", "AUROC", "audit: epsilon at least", "noise multiplier", "seconds")


def _name(epsilon: float | None) -> str:
    if epsilon is None:
        return ORDINARY
    return CLIPPED if math.isinf(epsilon) else f"epsilon {epsilon:g}"


def table(base: float, outcomes: dict[str, list[Outcome]]) -> list[list[str]]:
    """Return the rows: mean and standard error over the seeds, the largest bound of the audits, median seconds."""
    rows = [[BASE, f"{base:.1f}", "", "", "", "", ""]]
    for name, runs in outcomes.items():
        bound = max(one.epsilon_lower_bound for one in runs)
        rows.append(
            [
                name,
                *(_show([getattr(one, kind) for one in runs], digits) for kind, digits in _SPREAD),
                "" if math.isnan(bound) else f"{bound:.2f}",
                f"{runs[0].noise_multiplier:.2f}" if runs[0].noise_multiplier else "",
                f"{sorted(one.seconds for one in runs)[len(runs) // 2]:.0f}",
            ]
        )
    return rows


_SPREAD = (("perplexity", 2), ("exposure", 2), ("auroc", 3))


def _show(values: Sequence[float], digits: int) -> str:
    mean, error = reporting.mean_and_error(values)
    return f"{mean:.{digits}f}" if math.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def plot(base: float, outcomes: dict[str, list[Outcome]], path: Path) -> None:
    """Draw exposure and perplexity over the settings, a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(outcomes)
    for axes, kind in ((left, "exposure"), (right, "perplexity")):
        means = [reporting.mean_and_error([getattr(one, kind) for one in outcomes[name]])[0] for name in names]
        axes.plot(range(len(names)), means, color="tab:blue", marker="_", markersize=18, linewidth=1)
        for place, name in enumerate(names):
            values = [getattr(one, kind) for one in outcomes[name]]
            axes.scatter([place] * len(values), values, color="tab:blue", s=16, alpha=0.6)
        axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=9)
    left.axhline(_NO_MEMORY, color="black", linewidth=0.8, linestyle="--", label="no memory of the canaries")
    left.set_ylabel("mean exposure of a canary in bits")
    right.axhline(base, color="black", linewidth=0.8, linestyle="--", label="model before fine-tuning")
    right.set_ylabel("perplexity on held-out modules")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    parser.add_argument("--epsilons", type=float, nargs="*", default=[1.0, 3.0, 8.0], help="budgets")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the runs")
    for field in fields(Settings):
        kind = float if isinstance(field.default, float) else int
        parser.add_argument(
            f"--{field.name}", type=kind, default=field.default, help="see Settings (default %(default)s)"
        )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = Settings(**{field.name: getattr(given, field.name) for field in fields(Settings)})
    kinds: list[float | None] = [*sorted(given.epsilons), math.inf, None]
    base = base_perplexity()
    outcomes: dict[str, list[Outcome]] = {_name(epsilon): [] for epsilon in kinds}
    folder = Path(given.output_dir)
    for number, seed in enumerate(given.seeds):
        for epsilon in kinds:
            outcomes[_name(epsilon)].append(run(epsilon, settings, seed))
            print(f"seed {seed}, {_name(epsilon)}: {outcomes[_name(epsilon)][-1]}", flush=True)
        # After every seed, since all of them take an hour.
        _write(folder, base, outcomes, settings, given.seeds[: number + 1])
    reporting.print_table("private fine-tuning of the docstrings model on code", _HEADER, table(base, outcomes))
    return 0


def _write(
    folder: Path, base: float, outcomes: dict[str, list[Outcome]], settings: Settings, seeds: Sequence[int]
) -> None:
    results: dict[str, Any] = {name: [asdict(one) for one in runs] for name, runs in outcomes.items()}
    content = {"base_perplexity": base, "results": results, "settings": asdict(settings)}
    reporting.write_json(folder / "dp_docstrings.json", {**reporting.circumstances(seeds), **content})
    text = reporting.markdown(_HEADER, table(base, outcomes))
    (folder / "dp_docstrings.md").write_text(text, encoding="utf-8")
    plot(base, outcomes, folder / "dp_docstrings.png")


if __name__ == "__main__":
    raise SystemExit(main())
