"""What One More Step adds to the time of a call, against what its floating-point operations are worth.

`python -m hfnoise.benchmarks.one_more_step_overhead` times calls of a Stable Diffusion pipeline of an eighth of its
width, with and without, by turns, in processor time of one thread, and writes one_more_step_overhead.json. The
operations of both networks are counted by torch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from hfnoise.benchmarks.reporting import circumstances, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.latents import ResidualStatistics
from hfnoise.latents.hf_time_free_unet import TimeFreeUNet2DConditionModel
from hfnoise.pipelines import InitialNoise, OneMoreStep, TerminalPrior, guide
from hfnoise.worlds.brightness import SCHEDULE

# Issue: not more than the share of the operations, and this.
TOLERANCE = 0.01
_TOKENS, _WIDTH, _SIZE = 77, 96, 32
_COMMON: dict[str, Any] = {"cross_attention_dim": _WIDTH, "norm_num_groups": 4, "sample_size": _SIZE}


def networks() -> tuple[UNet2DConditionModel, TimeFreeUNet2DConditionModel]:
    """Return the base model and the module, both an eighth as wide as SD 1.5 and its released module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = UNet2DConditionModel(block_out_channels=(40, 80, 160, 160), attention_head_dim=8, **_COMMON)
        module = TimeFreeUNet2DConditionModel(
            block_out_channels=(20, 40, 80), attention_head_dim=(5, 10, 20), **_COMMON,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    return base.eval().requires_grad_(False), module.eval().requires_grad_(False)


def operations(base: Any, module: Any) -> tuple[int, int]:
    """Return the floating-point operations of one evaluation of each, for one sample."""
    sample, states = torch.zeros(1, 4, _SIZE, _SIZE), torch.zeros(1, _TOKENS, _WIDTH)
    counts = []
    for call in (lambda: base(sample, 0, states), lambda: module(sample, states)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def times(pipe: Any, starts: dict[str, InitialNoise | None], steps: int, repeats: int) -> dict[str, list[float]]:
    """Return the processor seconds of each call, the starts by turns."""
    states = torch.randn(2, 1, _TOKENS, _WIDTH, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {name: [] for name in starts}
    for number in range(repeats + 1):
        for name, start in starts.items():
            with guide(pipe, initial_noise=start):
                began = time.process_time()
                pipe(
                    prompt_embeds=states[0], negative_prompt_embeds=states[1], num_inference_steps=steps,
                    height=8 * _SIZE, width=8 * _SIZE, output_type="latent",
                    generator=torch.Generator().manual_seed(0),
                )  # fmt: skip
                taken = time.process_time() - began
            if number:  # the first round is to warm up
                found[name].append(taken)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; exit code 1 if One More Step costs more than its operations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    folder: Path = output_folder(given.output_dir)
    torch.set_num_threads(1)
    base, module = networks()
    scheduler = DDIMScheduler(**SCHEDULE, steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=base, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    prior = TerminalPrior(ResidualStatistics([0.0] * 4, (0.04 * torch.eye(4)).tolist()))
    starts: dict[str, InitialNoise | None] = {
        "white noise": None, "One More Step": OneMoreStep(module),
        "with terminal prior": OneMoreStep(module, terminal_prior=prior),
    }  # fmt: skip
    found = times(pipe, starts, given.steps, given.repeats)
    median = {name: statistics.median(seconds) for name, seconds in found.items()}
    overhead = {name: seconds / median["white noise"] - 1 for name, seconds in median.items()}
    flops = operations(base, module)
    # The base evaluates two rows at each step, of the prompt and without it.
    share = flops[1] / (2 * given.steps * flops[0])
    rows = [[name, f"{median[name]:.3f}", f"{100 * overhead[name]:+.2f}"] for name in starts]
    print_table(f"{given.steps} steps", ["start", "seconds of processor time", "overhead, %"], rows)
    passed = overhead["One More Step"] <= share + TOLERANCE
    print(f"{'ok  ' if passed else 'MISS'} overhead {overhead['One More Step']:.4f} <= operations {share:.4f} + 0.01")
    content = {"seconds": found, "overhead": overhead, "operations": flops, "share": share, "passed": passed}
    write_json(folder / "one_more_step_overhead.json", {**circumstances([0]), **content, "steps": given.steps})
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
