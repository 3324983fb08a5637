"""Which models start from noise that they never saw: the signal-to-noise ratio of the brightness at the first step.

`python -m hfnoise.benchmarks.start_gaps` computes it for the noise schedules that diffusers' conversion scripts write
for families of models, at the number of steps and the size that their pipelines default to, and writes
start_gaps.json and .md. Nothing is evaluated or downloaded; `hfnoise.start_gap(pipe)` says it of a pipeline of yours.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers

from hfnoise.benchmarks.reporting import circumstances, markdown, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.pipelines.gap import StartGap, schedule_gap

_SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_LEADING = {**_SD, "timestep_spacing": "leading"}


@dataclass(frozen=True)
class Family:
    """Models with one schedule.

    Args:
        name (`str`): of the models.
        scheduler (`str`): class of diffusers.
        steps (`int`): by default in their pipeline.
        side (`int`): of the latents.
        options (`dict`): of the scheduler.
    """

    name: str
    scheduler: str
    steps: int
    side: int
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES = (
    Family("Stable Diffusion 1.x, 512 pixels", "PNDMScheduler", 50, 64, {**_LEADING, "skip_prk_steps": True}),
    Family("Stable Diffusion 2.1, 768 pixels", "DDIMScheduler", 50, 96, {**_LEADING, "clip_sample": False}),
    Family("SDXL", "EulerDiscreteScheduler", 50, 128, _LEADING),
    Family("SDXL, trailing", "EulerDiscreteScheduler", 50, 128, {**_SD, "timestep_spacing": "trailing"}),
    Family("LCM-SDXL, 4 steps", "LCMScheduler", 4, 128, {**_SD, "clip_sample": False}),
    Family("SDXL-Turbo, 1 step, 512 pixels", "EulerAncestralDiscreteScheduler", 1, 64,
           {**_SD, "timestep_spacing": "trailing"}),
    Family("PixArt-alpha and -sigma, 1024 pixels", "DPMSolverMultistepScheduler", 20, 128),
    Family("DiT, 256 pixels", "DDIMScheduler", 50, 32, {"beta_schedule": "linear", "clip_sample": False}),
    Family("DeepFloyd IF, first stage", "DDPMScheduler", 100, 64, {"beta_schedule": "squaredcos_cap_v2"}),
    Family("EDM, sigma_max 80, at 64 x 64", "EDMEulerScheduler", 50, 64, {"sigma_max": 80.0}),
    Family("CogVideoX, CogView 3, zero terminal SNR", "DDIMScheduler", 50, 60,
           {**_SD, "clip_sample": False, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    Family("Stable Diffusion 3, Flux, Wan and others of flow matching", "FlowMatchEulerDiscreteScheduler", 28, 128),
)  # fmt: skip


def gap_of(family: Family) -> StartGap:
    """Return the gap of a family at its defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, and of options that diffusers wants set
        scheduler = getattr(diffusers, family.scheduler)(**family.options)
        return schedule_gap(scheduler, family.steps, (family.side, family.side))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    folder = output_folder(parser.parse_args(arguments).output_dir)
    header = ["models", "scheduler, steps", "first timestep", "a / s", "brightness SNR", "gap"]
    rows, found = [], []
    for family in FAMILIES:
        gap = gap_of(family)
        ratio = ["0", "0"] if gap.reason else [f"{gap.signal / gap.noise:.4f}", f"{gap.brightness_snr:.3g}"]
        scheduler = f"{family.scheduler.removesuffix('Scheduler')}, {family.steps}"
        rows.append([family.name, scheduler, f"{gap.timestep:g}", *ratio, gap.level])
        found.append({"family": family.name, **vars(gap), "brightness_snr": gap.brightness_snr})
    print_table("start of sampling, by family", header, rows)
    write_json(folder / "start_gaps.json", {**circumstances([]), "families": found})
    (folder / "start_gaps.md").write_text(markdown(header, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
