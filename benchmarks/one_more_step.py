"""Brightness of samples against where they start: white noise, One More Step, the terminal prior, noised data.

`python -m hfnoise.benchmarks.one_more_step` draws the brightness world (hfnoise/worlds/brightness.py) by schedulers of
diffusers and writes one_more_step.json, .md and .png. The base model is the exact posterior mean, so that only the
start can be wrong; the module of One More Step is trained for each seed by OneMoreStepTrainer. Peers are the official
code of One More Step and of SingDiffusion, and base models that were trained again: with zero terminal SNR and with
offset noise. `--preset small --schedulers DDIM --seeds 0` takes about half a minute of one core.

The error is the Wasserstein-1 distance of the brightness of samples from that of real images of the same prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm.auto import tqdm

from hfnoise.benchmarks import reporting
from hfnoise.benchmarks.one_more_step_pictures import plot
from hfnoise.benchmarks.one_more_step_starts import (
    EXACT_MATCHED,
    LIMIT,
    MATCHED,
    OFFICIAL,
    OMS,
    WHITE,
    starts,
    train_module,
)
from hfnoise.benchmarks.reporting import mean_and_error
from hfnoise.folders import output_folder
from hfnoise.pipelines import InitialNoise, guide
from hfnoise.worlds.brightness import (
    MEANS,
    PROMPTS,
    SCHEDULE,
    SPREAD,
    brightness_error,
    draw_latents,
    draw_prompts,
    new_brightness_pipeline,
    prompt_states,
    theory,
)

ZERO_SNR, OFFSET, FLOOR = "base retrained at zero SNR", "base retrained with offset noise", "other data"
# Of the paper's and our claims: One More Step over white noise; the terminal prior over One More Step, and with the
# exact mean over noised data, which is as well as one can start; means of different solvers, and from the truth.
OMS_SHARE, PRIOR_SHARE, LIMIT_SHARE, MEAN_TOLERANCE, MEAN_ERROR = 0.2, 0.8, 1.3, 0.01, 0.05
PRESETS = {
    "full": {"images": 600, "steps": 50, "size": 32, "train_steps": 300},
    "small": {"images": 200, "steps": 20, "size": 32, "train_steps": 300},
}
_LEADING: dict[str, Any] = {"steps_offset": 1, "timestep_spacing": "leading"}
# Class, options, and steps where they are not the preset's.
_SCHEDULERS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, **_LEADING}, None),
    "Euler": ("EulerDiscreteScheduler", _LEADING, None),
    "DPM++": ("DPMSolverMultistepScheduler", _LEADING, None),
    "UniPC": ("UniPCMultistepScheduler", _LEADING, None),
    # Of consistency models, as many as they are drawn with. It draws new noise at every step, so that in many of them
    # the start is forgotten, and its samples are no solver's: it has no part in the comparison of solvers.
    "LCM": ("LCMScheduler", {"steps_offset": 1}, 4),
}
_SOLVERS = ("DDIM", "Euler", "DPM++", "UniPC")
# Of diffusers' `--noise_offset`; nearly three times the 0.0357 that is usual, in favour of that peer.
_NOISE_OFFSET = 0.1

Scores = dict[str, dict[str, dict[str, float]]]


def scores(latents: torch.Tensor, reference: torch.Tensor, prompts: torch.Tensor) -> dict[str, float]:
    """Return the error of the brightness, its mean by prompt, and its spread within the dark and the bright one."""
    brightness = latents.double().flatten(1).mean(1)
    by_prompt = [brightness[prompts == number] for number in range(len(PROMPTS))]
    found = {f"mean_{name}": float(part.mean()) for name, part in zip(PROMPTS, by_prompt, strict=True)}
    spread = float(by_prompt[0].std() + by_prompt[-1].std()) / 2
    return {"error": brightness_error(latents, reference, prompts), "spread": spread, **found}


def draw(
    pipe: Any, prompts: torch.Tensor, size: int, steps: int, start: InitialNoise | None, seed: int = 1
) -> torch.Tensor:
    """Return the latents that a pipeline draws for the prompts, from the noise of a seed."""
    with guide(pipe, initial_noise=start):
        return pipe(
            prompt_embeds=prompt_states(prompts), guidance_scale=1.0, num_inference_steps=steps, height=8 * size,
            width=8 * size, output_type="latent", generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip


def retrained(size: int) -> dict[str, Any]:
    """Return pipelines of base models that were trained otherwise; they start from white noise."""
    kind = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1, **kind)
    return {
        ZERO_SNR: new_brightness_pipeline(scheduler, size, "v_prediction", zero_snr=True),
        OFFSET: new_brightness_pipeline(size=size, noise_offset=_NOISE_OFFSET),
    }


def run(
    seed: int, schedulers: Sequence[str], images: int, steps: int, size: int, train_steps: int
) -> tuple[Scores, dict[str, Any]]:
    """Return the scores of one seed by scheduler and start, and what there is to see.

    Args:
        seed (`int`): of the module and its training, of the real images, and of the noise.
        schedulers (sequence of `str`): names of the table above.
        images, steps, size, train_steps: of a preset.

    Returns:
        The scores; and `explained`, the module's low-frequency R^2, the `prompts`, the real images (`real`) and those
        of each start by DDIM (`drawn`).
    """
    module, explained = train_module(train_steps, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    prompts = draw_prompts(images, generator)
    reference, other = (draw_latents(prompts, size, generator) for _ in range(2))
    found: Scores = {}
    seen: dict[str, Any] = {"explained": explained, "prompts": prompts, "real": reference, "drawn": {}}
    for name in tqdm(schedulers, desc=f"seed {seed}", leave=False):
        class_name, options, own_steps = _SCHEDULERS[name]
        pipe = new_brightness_pipeline(getattr(diffusers, class_name)(**SCHEDULE, **options), size)
        found[name] = {}
        for start, member in starts(module, other).items():
            latents = draw(pipe, prompts, size, own_steps or steps, member, seed)
            found[name][start] = scores(latents, reference, prompts)
            if name == "DDIM":
                seen["drawn"][start] = latents
    for name, pipe in retrained(size).items():
        found["DDIM"][name] = scores(draw(pipe, prompts, size, steps, None, seed), reference, prompts)
    found["DDIM"][FLOOR] = scores(other, reference, prompts)
    return found, seen


def _mean(runs: Sequence[Scores], scheduler: str, start: str, key: str) -> float:
    return mean_and_error([found[scheduler][start][key] for found in runs])[0]


def between_solvers(runs: Sequence[Scores], start: str) -> float:
    """Return by how much the mean brightness of a prompt differs between solvers at most, of means over seeds."""
    solvers = [name for name in _SOLVERS if name in runs[0]]
    by_prompt = [[_mean(runs, name, start, f"mean_{prompt}") for name in solvers] for prompt in PROMPTS]
    return max(max(means) - min(means) for means in by_prompt)


def acceptance(runs: Sequence[Scores]) -> list[tuple[str, bool]]:
    """Return what was claimed and whether it holds, on means over the seeds."""

    def ratio(first: str, second: str, bound: float) -> tuple[str, bool]:
        errors = [_mean(runs, "DDIM", start, "error") for start in (first, second)]
        share = errors[0] / errors[1]
        return f"error of {first} / {second}: {share:.3f} <= {bound}", share <= bound

    apart = {start: between_solvers(runs, start) for start in (OMS, MATCHED)}
    solvers = ", ".join(name for name in _SOLVERS if name in runs[0])
    means = [
        (_mean(runs, scheduler, OMS, f"mean_{prompt}"), truth)
        for scheduler in runs[0]
        for prompt, truth in ((PROMPTS[0], MEANS[0]), (PROMPTS[-1], MEANS[-1]))
    ]
    off = max(abs(mean - truth) for mean, truth in means)
    return [
        ratio(OMS, WHITE, OMS_SHARE),
        ratio(MATCHED, OMS, PRIOR_SHARE),
        ratio(EXACT_MATCHED, LIMIT, LIMIT_SHARE),
        *((f"mean of a prompt, {start}, by {solvers}: {distance:.4f} apart <= {MEAN_TOLERANCE}",
           distance <= MEAN_TOLERANCE) for start, distance in apart.items()),
        (f"mean of a prompt, {OMS}, by {', '.join(runs[0])}: {off:.3f} from the truth <= {MEAN_ERROR}",
         off <= MEAN_ERROR),
    ]  # fmt: skip


def table(runs: Sequence[Scores]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: means over seeds, and the standard error of the mean."""
    header = ["scheduler", "start", "brightness error", "mean dark", "mean bright", f"spread (true {SPREAD})"]
    rows = []
    for scheduler, by_start in runs[0].items():
        for start in by_start:
            columns = [
                mean_and_error([found[scheduler][start][key] for found in runs])
                for key in ("error", "mean_dark", "mean_bright", "spread")
            ]
            error = f"{columns[0][0]:.4f}" + (f" ± {columns[0][1]:.4f}" if len(runs) > 1 else "")
            rows.append([scheduler, start, error, *(f"{mean:.3f}" for mean, _ in columns[1:])])
    return header, rows


def table_by_scheduler(runs: Sequence[Scores]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the mean errors: a row a start, a column a scheduler."""
    schedulers = list(runs[0])
    common = [start for start in runs[0][schedulers[0]] if all(start in runs[0][name] for name in schedulers)]
    rows = []
    for start in common:
        errors = [_mean(runs, name, start, "error") for name in schedulers]
        rows.append([start, *(f"{error:.4f}" for error in errors), f"{between_solvers(runs, start):.4f}"])
    few = {name: own_steps for name, (_, _, own_steps) in _SCHEDULERS.items()}
    columns = [f"{name}, {few[name]} steps" if few[name] else name for name in schedulers]
    return ["start", *columns, "means of solvers apart"], rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; exit code 1 if an acceptance bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--schedulers", nargs="+", choices=list(_SCHEDULERS), default=list(_SCHEDULERS))
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    if "DDIM" not in given.schedulers:
        parser.error("--schedulers must hold DDIM: the claims are about it.")
    folder: Path = output_folder(given.output_dir)
    torch.set_num_threads(1)
    preset = PRESETS[given.preset]
    runs: list[Scores] = []
    explained: list[float] = []
    for seed in tqdm(given.seeds, desc="seeds"):
        found, seen = run(seed, given.schedulers, **preset)
        runs.append(found)
        explained.append(seen["explained"])
        if seed == given.seeds[0]:
            plot(seen, folder / "one_more_step.png")
    tables = [table(runs), table_by_scheduler(runs)]
    title = f"brightness, {preset['images']} images, {preset['steps']} steps"
    for name, (header, rows) in zip((title, "error by scheduler"), tables, strict=True):
        reporting.print_table(name, header, rows)
    checks = acceptance(runs)
    judged = reporting.judge(checks)
    print(f"     {OFFICIAL}: means of solvers {between_solvers(runs, OFFICIAL):.4f} apart")
    pipe = new_brightness_pipeline(size=preset["size"])
    pipe.scheduler.set_timesteps(preset["steps"])
    power = float(pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[0])])
    content = {
        "preset": preset, "runs": runs, "acceptance": [list(check) for check in checks],
        "low_frequency_r2": explained, "theory": theory(power, preset["size"]),
    }  # fmt: skip
    reporting.write_json(folder / "one_more_step.json", {**reporting.circumstances(given.seeds), **content})
    parts = [*(reporting.markdown(header, rows) for header, rows in tables), judged]
    (folder / "one_more_step.md").write_text("\n".join(parts), encoding="utf-8")
    return int(not all(passed for _, passed in checks))


if __name__ == "__main__":
    raise SystemExit(main())
