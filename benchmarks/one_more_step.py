"""Brightness of samples against where they start: white noise, One More Step, the terminal prior, noised data.

`python -m hfnoise.benchmarks.one_more_step` draws the brightness world (hfnoise/worlds/brightness.py) by schedulers of
diffusers and writes one_more_step.json, .md and .png. The base model is the exact posterior mean, so that only the
start can be wrong; the module of One More Step is trained for each seed. `--preset small` takes half a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm.auto import tqdm

from hfnoise.benchmarks.reporting import circumstances, markdown, mean_and_error, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.latents import ResidualStatistics
from hfnoise.latents.hf_time_free_unet import TimeFreeUNet2DConditionModel, set_module_residuals
from hfnoise.pipelines import OneMoreStep, StartEstimate, TerminalPrior, guide
from hfnoise.pipelines.start_estimate import Estimate
from hfnoise.worlds.brightness import (
    CHANNELS,
    MEANS,
    PROMPTS,
    SCHEDULE,
    SPREAD,
    ExactMean,
    brightness_error,
    draw_latents,
    draw_prompts,
    empty_states,
    new_brightness_pipeline,
    prompt_states,
    theory,
)

WHITE, OFFICIAL, OMS, MATCHED = "white noise", "official arithmetic", "One More Step", "with terminal prior"
EXACT, EXACT_MATCHED, LIMIT = "exact mean", "exact mean with terminal prior", "noised data"
ZERO_SNR, FLOOR = "base retrained at zero SNR", "other data"
# Of the paper's and our claims: One More Step over white noise; the terminal prior over One More Step, and with the
# exact mean over noised data, which is as well as one can start; means of different solvers.
OMS_SHARE, PRIOR_SHARE, LIMIT_SHARE, MEAN_TOLERANCE = 0.2, 0.8, 1.3, 0.01
PRESETS = {
    "full": {"images": 600, "steps": 50, "size": 32, "train_steps": 300},
    "small": {"images": 200, "steps": 20, "size": 32, "train_steps": 150},
}
_TRAIN_SIZE, _BATCH, _PROMPT_DROPOUT = 16, 16, 0.1
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": (
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"},
    ),
    "Euler": ("EulerDiscreteScheduler", {"steps_offset": 1, "timestep_spacing": "leading"}),
    "DPM++": ("DPMSolverMultistepScheduler", {"steps_offset": 1, "timestep_spacing": "leading"}),
    "UniPC": ("UniPCMultistepScheduler", {"steps_offset": 1, "timestep_spacing": "leading"}),
    "LCM": ("LCMScheduler", {"steps_offset": 1}),
}
# A consistency model's sampler draws new noise at every step; around another model its samples are no reference.
_SOLVERS = ("DDIM", "Euler", "DPM++", "UniPC")


def train_module(steps: int, seed: int) -> TimeFreeUNet2DConditionModel:
    """Return a small module of One More Step, trained on the world at 16 x 16, with its residual statistics.

    Args:
        steps (`int`): of AdamW with a one-cycle schedule.
        seed (`int`): of weights and data.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = TimeFreeUNet2DConditionModel(
            in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4, attention_head_dim=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=len(PROMPTS),
        )  # fmt: skip
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        prompts = draw_prompts(_BATCH, generator)
        x0 = draw_latents(prompts, _TRAIN_SIZE, generator)
        states = prompt_states(prompts)
        dropped = torch.rand(_BATCH, generator=generator) < _PROMPT_DROPOUT
        states[dropped] = empty_states(1)
        noise = torch.randn(x0.shape, generator=generator)
        # v at a signal-to-noise ratio of 0 is -x0.
        loss = (module(noise, states).sample + x0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    module.eval().requires_grad_(False)
    prompts = draw_prompts(512, generator)
    x0 = draw_latents(prompts, _TRAIN_SIZE, generator)
    residuals = x0 + module(torch.randn(x0.shape, generator=generator), prompt_states(prompts)).sample
    set_module_residuals(module, ResidualStatistics.fit(residuals))
    return module


class NoisedData(StartEstimate):
    """The start of training itself: images with noise on them."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def estimate(self, noise: torch.Tensor, context: Any) -> Estimate:
        """Return the images."""
        return Estimate(self.images, noise)


def starts(module: Any, images: torch.Tensor) -> dict[str, StartEstimate | None]:
    """Return every start by name; `images` are noised for the limit."""
    exact = ExactMean()
    within = TerminalPrior(ResidualStatistics([0.0] * CHANNELS, [[SPREAD**2] * CHANNELS] * CHANNELS))
    return {
        WHITE: None,
        OFFICIAL: OneMoreStep(module, compat="official", terminal_prior=False),
        OMS: OneMoreStep(module, terminal_prior=False),
        MATCHED: OneMoreStep(module),
        EXACT: OneMoreStep(exact),
        EXACT_MATCHED: OneMoreStep(exact, terminal_prior=within),
        LIMIT: NoisedData(images),
    }


def scores(latents: torch.Tensor, reference: torch.Tensor, prompts: torch.Tensor) -> dict[str, float]:
    """Return the error of the brightness, its mean by prompt, and its spread within the dark and the bright one."""
    brightness = latents.double().flatten(1).mean(1)
    by_prompt = [brightness[prompts == number] for number in range(len(PROMPTS))]
    found = {f"mean_{name}": float(part.mean()) for name, part in zip(PROMPTS, by_prompt, strict=True)}
    spread = float(by_prompt[0].std() + by_prompt[-1].std()) / 2
    return {"error": brightness_error(latents, reference, prompts), "spread": spread, **found}


def draw(pipe: Any, prompts: torch.Tensor, size: int, steps: int, start: StartEstimate | None) -> torch.Tensor:
    """Return the latents that a pipeline draws for the prompts; the noise is the same at every call."""
    with guide(pipe, initial_noise=start):
        return pipe(
            prompt_embeds=prompt_states(prompts), guidance_scale=1.0, num_inference_steps=steps, height=8 * size,
            width=8 * size, output_type="latent", generator=torch.Generator().manual_seed(1),
        ).images  # fmt: skip


def run(
    seed: int, schedulers: Sequence[str], images: int, steps: int, size: int, train_steps: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the scores of one seed by scheduler and start.

    Args:
        seed (`int`): of the module, its training and the real images; not of the noise.
        schedulers (sequence of `str`): names of the table above.
        images, steps, size, train_steps: of a preset.
    """
    module = train_module(train_steps, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    prompts = draw_prompts(images, generator)
    reference, other = (draw_latents(prompts, size, generator) for _ in range(2))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in tqdm(schedulers, desc=f"seed {seed}", leave=False):
        class_name, options = _SCHEDULERS[name]
        pipe = new_brightness_pipeline(getattr(diffusers, class_name)(**SCHEDULE, **options), size)
        found[name] = {
            start: scores(draw(pipe, prompts, size, steps, member), reference, prompts)
            for start, member in starts(module, other).items()
        }
    retrained = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1, **retrained)
    pipe = new_brightness_pipeline(scheduler, size, "v_prediction", zero_snr=True)
    found["DDIM"][ZERO_SNR] = scores(draw(pipe, prompts, size, steps, None), reference, prompts)
    found["DDIM"][FLOOR] = scores(other, reference, prompts)
    return found


def acceptance(runs: Sequence[dict[str, dict[str, dict[str, float]]]]) -> list[tuple[str, bool]]:
    """Return what was claimed and whether it holds, on means over the seeds."""

    def error(start: str, scheduler: str = "DDIM") -> float:
        return mean_and_error([found[scheduler][start]["error"] for found in runs])[0]

    def ratio(first: str, second: str, bound: float) -> tuple[str, bool]:
        share = error(first) / error(second)
        return f"error of {first} / {second}: {share:.3f} <= {bound}", share <= bound

    solvers = [name for name in _SOLVERS if name in runs[0]]
    bright = {name: mean_and_error([found[name][OMS]["mean_bright"] for found in runs])[0] for name in solvers}
    apart = max(bright.values()) - min(bright.values())
    off = abs(bright["DDIM"] - MEANS[-1])
    return [
        ratio(OMS, WHITE, OMS_SHARE),
        ratio(MATCHED, OMS, PRIOR_SHARE),
        ratio(EXACT_MATCHED, LIMIT, LIMIT_SHARE),
        (f"mean of the bright prompt, {', '.join(solvers)}: {apart:.4f} apart <= {MEAN_TOLERANCE}",
         apart <= MEAN_TOLERANCE),
        (f"mean of the bright prompt {off:.3f} from the truth <= 0.05", off <= 0.05),
    ]  # fmt: skip


def table(runs: Sequence[dict[str, dict[str, dict[str, float]]]]) -> tuple[list[str], list[list[str]]]:
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


def plot(seed: int, images: int, steps: int, size: int, train_steps: int, path: Path) -> None:
    """Write histograms of the brightness of samples of DDIM, by start, over that of real images."""
    from matplotlib.figure import Figure

    module = train_module(train_steps, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    prompts = draw_prompts(images, generator)
    reference, other = (draw_latents(prompts, size, generator).mean((1, 2, 3)) for _ in range(2))
    pipe = new_brightness_pipeline(size=size)
    members = {name: starts(module, other)[name] for name in (WHITE, OMS, MATCHED)}
    figure = Figure(figsize=(9, 7), layout="constrained")
    for axes, (name, member) in zip(figure.subplots(3, 1, sharex=True, sharey=True), members.items(), strict=True):
        drawn = draw(pipe, prompts, size, steps, member).mean((1, 2, 3))
        bins = [-1.6 + 0.08 * number for number in range(41)]
        axes.hist(reference.tolist(), bins, color="0.8", label="real images")
        axes.hist(drawn.tolist(), bins, histtype="step", linewidth=2, color="C0", label=name)
        axes.set_ylabel("images")
        axes.legend()
    axes.set_xlabel("brightness: mean of the latents")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


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
    runs = [run(seed, given.schedulers, **preset) for seed in given.seeds]
    header, rows = table(runs)
    print_table(f"brightness, {preset['images']} images, {preset['steps']} steps", header, rows)
    checks = acceptance(runs)
    for statement, passed in checks:
        print(f"{'ok  ' if passed else 'MISS'} {statement}")
    pipe = new_brightness_pipeline(size=preset["size"])
    pipe.scheduler.set_timesteps(preset["steps"])
    power = float(pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[0])])
    content = {
        "preset": preset, "runs": runs, "acceptance": [list(check) for check in checks],
        "theory": theory(power, preset["size"]),
    }  # fmt: skip
    write_json(folder / "one_more_step.json", {**circumstances(given.seeds), **content})
    lines = [f"- {'met' if passed else '**missed**'}: {statement}\n" for statement, passed in checks]
    (folder / "one_more_step.md").write_text("\n".join([markdown(header, rows), "".join(lines)]), encoding="utf-8")
    plot(given.seeds[0], path=folder / "one_more_step.png", **preset)
    return int(not all(passed for _, passed in checks))


if __name__ == "__main__":
    raise SystemExit(main())
