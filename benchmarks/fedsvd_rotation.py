"""FedSVD's refactorisation of a layer: rotation by the Gram matrix, full SVD of B A, randomised SVD of B A.

`python -m hfnoise.benchmarks.fedsvd_rotation` prints a table and writes fedsvd_rotation.json and .md. Full SVD is what
the official code of arXiv 2505.12805 takes per layer and round; the paper also times a randomised one
(`torch.svd_lowrank`, two iterations). Matrices are random; no step depends on their values. Times are CPU times of one
thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hfnoise.benchmarks.reporting import circumstances, markdown, print_table, write_json
from hfnoise.errors import UsageError
from hfnoise.folders import output_folder
from hfnoise.privacy.fedsvd import RotationMessage, initial_lora_A, rotate_lora, rotation_digest
from hfnoise.privacy.lora_rotation import orthonormality_error

OURS, FULL, RANDOMISED = "rotate_lora", "full SVD of B A", "randomised SVD of B A"


@dataclass(frozen=True)
class Case:
    """Layers of one shape, all refactorised one after the other."""

    width: int
    rank: int
    layers: int


# The last is RoBERTa-large with adapters on query and value, as in the paper.
CASES = {
    "1024 x 1024, r = 8": Case(1024, 8, 1),
    "4096 x 4096, r = 16": Case(4096, 16, 1),
    "48 layers of 1024 x 1024, r = 8": Case(1024, 8, 48),
}


def full_svd(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors as the official code makes them."""
    left, values, right = torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
    rank = len(lora_A)
    return right[:rank], left[:, :rank] * values[:rank]


def randomised_svd(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors by randomised subspace iteration on the dense product."""
    left, values, right = torch.svd_lowrank(lora_B @ lora_A, q=len(lora_A), niter=2)
    return right.mT, left * values


def rotation(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors as hfnoise makes them."""
    return rotate_lora(lora_A, lora_B)[:2]


WAYS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    OURS: rotation, RANDOMISED: randomised_svd, FULL: full_svd,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of one way, for all layers of a case.

    Args:
        seconds (`float`): CPU time, median over repetitions.
        fastest (`float`): of the repetitions, seconds.
        product_error (`float`): largest of |B' A' - B A| of the first layer, relative to the largest entry of B A.
        row_error (`float`): largest entry of |A' A'^T - I|.
    """

    seconds: float
    fastest: float
    product_error: float
    row_error: float


def make_layers(case: Case, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return orthonormal A and normal B, as a round of training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            initial_lora_A("orthonormal", case.rank, case.width, generator=generator),
            torch.randn(case.width, case.rank, generator=generator),
        )
        for _ in range(case.layers)
    ]


def measure(case: Case, repeats: dict[str, int], seed: int) -> dict[str, Cost]:
    """Return the cost of every way."""
    layers = make_layers(case, seed)
    costs = {}
    for name, way in WAYS.items():
        if name != FULL:  # a warm-up that costs nothing beside the run
            way(*layers[0])
        times = []
        for _ in range(repeats[name]):
            start = time.process_time()
            results = [way(*layer) for layer in layers]
            times.append(time.process_time() - start)
        (lora_A, lora_B), (new_A, new_B) = layers[0], results[0]
        product = lora_B @ lora_A
        error = float((new_B @ new_A - product).abs().max() / product.abs().max())
        rows = max(orthonormality_error(result[0]) for result in results)
        costs[name] = Cost(statistics.median(times), min(times), error, rows)
    return costs


def message_floats(case: Case) -> dict[str, int]:
    """Return the numbers that a server sends per round and client: ours, and two that are in use."""
    lora_B, turn = torch.zeros(case.width, case.rank), torch.eye(case.rank)
    message = RotationMessage("layer", 0, 0, lora_B, turn, rotation_digest("layer", 0, turn))
    factor = case.width * case.rank
    return {
        "B and rotation": case.layers * message.floats,
        "A and B": case.layers * 2 * factor,
        "dense B A": case.layers * case.width**2,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50, help="timed repetitions of the rotation")
    parser.add_argument("--svd_repeats", type=int, default=3, help="of the randomised SVD; of the full one, 1")
    parser.add_argument("--seed", type=int, default=0, help="of the matrices")
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help="by default all"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("benchmark_results"), help="folder of JSON and Markdown"
    )
    given = parser.parse_args(arguments)
    given.output_dir = output_folder(given.output_dir)
    if min(given.repeats, given.svd_repeats) < 1:
        raise UsageError("--repeats and --svd_repeats must be at least 1.")
    torch.set_num_threads(1)  # then CPU time is the time it takes, whatever else the machine does
    torch.manual_seed(given.seed)  # svd_lowrank draws from the global generator
    repeats = {OURS: given.repeats, RANDOMISED: given.svd_repeats, FULL: 1}
    header = ["way", "time", "times the rotation", "error of B A", "error of A A^T"]
    results, tables = {}, []
    for title in given.cases:
        case = CASES[title]
        costs = measure(case, repeats, given.seed)
        rows = [_row(name, cost, costs[OURS]) for name, cost in costs.items()]
        floats = message_floats(case)
        sizes = ", ".join(f"{name} {count:,}" for name, count in floats.items())
        print_table(f"{title} (floats sent to a client: {sizes})", header, rows)
        results[title] = {"costs": {name: asdict(cost) for name, cost in costs.items()}, "floats": floats}
        tables.append(f"{title}; floats sent to a client per round: {sizes}\n\n{markdown(header, rows)}")
    settings = {name: value for name, value in vars(given).items() if name != "output_dir"}
    report = {**circumstances([given.seed]), "settings": settings, "results": results}
    write_json(given.output_dir / "fedsvd_rotation.json", report)
    (given.output_dir / "fedsvd_rotation.md").write_text("\n".join(tables), encoding="utf-8")
    return 0


def _row(name: str, cost: Cost, base: Cost) -> list[str]:
    return [
        name,
        f"{1e3 * cost.seconds:.2f} ms" if cost.seconds < 1 else f"{cost.seconds:.1f} s",
        f"{cost.seconds / base.seconds:,.0f}",
        f"{cost.product_error:.1e}",
        f"{cost.row_error:.1e}",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
