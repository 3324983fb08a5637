"""The exactness matrix of guidance: what every family of pipelines does with a guider that changes nothing.

`python -m hfnoise.benchmarks.guidance_exactness` builds a tiny pipeline of every family that diffusers guides and
measures three differences of what it returns: guidance that never stops against the stock pipeline, guidance that
stops at once against the stock pipeline without guidance, and a batch whose samples stop at different steps against
each sample alone. The first two must be zero to the bit. It writes guidance_exactness.json and .md.
"""

from __future__ import annotations

import argparse
import builtins
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as hf_logging

from hfnoise.benchmarks.reporting import circumstances, markdown, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.pipelines import AdaptiveGuidance, guide
from hfnoise.pipelines.pipeline_layouts import layout_of
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, TinyFamily, images_of

# Relative to the largest value of what is returned: what kernels of another batch size may change.
MIXED_BOUND = 1e-5
# The first steps without guidance of the two samples of a mixed batch.
MIXED_STOPS = (1, 3)


class _ForcedStops(AdaptiveGuidance):
    """Stops guiding each sample at the step that it is told, whatever the predictions are."""

    stops: tuple[int, ...]

    def _guided(self) -> torch.Tensor:
        return torch.tensor([self._step < stop for stop in self.stops])

    def _observe(self, step: Any) -> None:
        pass


def forced_stops(*stops: int, **options: Any) -> AdaptiveGuidance:
    """Return a guider that stops guiding the samples at these steps.

    Args:
        stops (`int`): the first step without guidance, of each sample.
        options: of [`AdaptiveGuidance`], such as `inner`.
    """
    guider = _ForcedStops(space="model", **options)
    guider.stops = stops
    return guider


@dataclass(frozen=True)
class Exactness:
    """A row of the matrix.

    Args:
        pipeline (`str`): class of diffusers.
        layout (`str`): how it calls its denoiser.
        never_stopped, stopped_at_once (`float`): largest absolute differences.
        never_stopped_bitwise, stopped_at_once_bitwise (`bool`): whether there is none.
        mixed (`float`): largest difference, relative to the largest value.
        rows, mixed_rows (`tuple[int, ...]`): rows that the denoiser evaluated per step, for two samples: with
            guidance at all steps, and in the mixed batch.
    """

    pipeline: str
    layout: str
    never_stopped: float
    never_stopped_bitwise: bool
    stopped_at_once: float
    stopped_at_once_bitwise: bool
    mixed: float
    rows: tuple[int, ...]
    mixed_rows: tuple[int, ...]

    @property
    def passed(self) -> bool:
        """Whether the family keeps the promise."""
        return self.never_stopped_bitwise and self.stopped_at_once_bitwise and self.mixed <= MIXED_BOUND


def measure(family: TinyFamily) -> Exactness:
    """Return the row of a family.

    Args:
        family ([`~hfnoise.worlds.tiny_pipelines.TinyFamily`]): one that is guided.
    """
    pipe = family.build()

    def run(call: dict[str, Any], guider: AdaptiveGuidance | None = None) -> torch.Tensor:
        if guider is None:
            return images_of(pipe(**call))
        with guide(pipe, guider):
            return images_of(pipe(**call))

    layout = layout_of(type(pipe))
    assert layout is not None
    # A threshold of 1 is reached by predictions of one direction only, to the last digit.
    never = AdaptiveGuidance(threshold=1.0, space="x0" if layout.x0_from_scheduler else "model")
    stock, guided = run(family.call(2)), run(family.call(2), never)
    conditional, stopped = run(family.conditional_call(2)), run(family.call(2), forced_stops(0, 0))
    mixed = forced_stops(*MIXED_STOPS)
    together = run(family.call(2), mixed)
    alone = torch.cat([run(family.call(1, row), forced_stops(stop)) for row, stop in enumerate(MIXED_STOPS)])
    return Exactness(
        pipeline=type(pipe).__name__, layout=layout.kind.replace("_", " "),
        never_stopped=_largest(guided - stock), never_stopped_bitwise=torch.equal(guided, stock),
        stopped_at_once=_largest(stopped - conditional), stopped_at_once_bitwise=torch.equal(stopped, conditional),
        mixed=_largest(together - alone) / _largest(alone), rows=never.report.rows, mixed_rows=mixed.report.rows,
    )  # fmt: skip


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def table(found: dict[str, Exactness]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the matrix."""
    header = [
        "family", "pipeline", "layout", "never stopped: difference to stock", "stopped at once: to no guidance",
        "mixed batch: to its samples alone", "rows per step, guided", "rows per step, mixed",
    ]  # fmt: skip
    rows = [
        [
            name, one.pipeline, one.layout, _difference(one.never_stopped, one.never_stopped_bitwise),
            _difference(one.stopped_at_once, one.stopped_at_once_bitwise), f"{one.mixed:.1e}",
            " ".join(map(str, one.rows)), " ".join(map(str, one.mixed_rows)),
        ]
        for name, one in found.items()
    ]  # fmt: skip
    return header, rows


def _difference(value: float, bitwise: bool) -> str:
    return "0, bitwise" if bitwise else f"{value:.1e}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; exit code 1 if a family misses its bounds."""
    guided = [name for name, family in FAMILIES.items() if family.guided]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=guided, default=guided, metavar="FAMILY", help="default all")
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    folder: Path = output_folder(given.output_dir)
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    with warnings.catch_warnings():
        for warning in STOCK_WARNINGS:
            _, message, category = warning.split(":")
            warnings.filterwarnings("ignore", message, getattr(builtins, category))
        found = {name: measure(FAMILIES[name]) for name in tqdm(given.families, desc="families")}
    header, rows = table(found)
    print_table("exactness", header, rows)
    passed = sum(one.passed for one in found.values())
    print(f"{passed} of {len(found)} families: bitwise, and mixed batches within {MIXED_BOUND:g}")
    content = {
        "families": {name: asdict(one) for name, one in found.items()}, "mixed_bound": MIXED_BOUND,
        "acceptance": [[f"{name} is exact", one.passed] for name, one in found.items()],
    }  # fmt: skip
    write_json(folder / "guidance_exactness.json", {**circumstances([0]), **content})
    (folder / "guidance_exactness.md").write_text(markdown(header, rows), encoding="utf-8")
    return int(passed < len(found))


if __name__ == "__main__":
    raise SystemExit(main())
