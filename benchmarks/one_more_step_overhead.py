"""What One More Step adds to the time and the memory of a call, against the operations of its network.

`python -m hfnoise.benchmarks.one_more_step_overhead` calls a Stable Diffusion pipeline of a quarter of its width from
white noise, with One More Step and with the terminal prior, in processor time of one thread, and writes
one_more_step_overhead.json and .md. Floating-point operations are counted by torch: the module has 0.22 of the base's,
where One More Step's released one has 0.20 of Stable Diffusion 1.5's, at 64 x 64.

A narrow network takes longer for an operation than a wide one, so its own time is measured too, by itself between the
calls. What a start adds is measured twice: by whole calls, as the median of ratios to white noise, two calls between
two; and before the first step, up to the first evaluation of the base, which is all that a start can change and says
it more exactly. Memory is the largest of a process that draws one image.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from hfnoise.benchmarks import reporting
from hfnoise.folders import output_folder
from hfnoise.latents import ResidualStatistics
from hfnoise.latents.hf_time_free_unet import TimeFreeUNet2DConditionModel
from hfnoise.pipelines import InitialNoise, OneMoreStep, TerminalPrior, guide
from hfnoise.worlds.brightness import SCHEDULE

WHITE, OMS, PRIOR = "white noise", "One More Step", "terminal prior"
# Not more than the share of the operations, and this; beside the network, about nothing; and what the spread of the
# result must be below for the first to mean anything.
TOLERANCE, BESIDE, SETTLED = 0.01, 0.001, 0.003
# Of a process, whose allocator keeps pages in reserve: in bytes of the module's weights.
MEMORY_TOLERANCE = 0.1
_TOKENS, _WIDTH, _SIZE = 77, 192, 32
_COMMON: dict[str, Any] = {"cross_attention_dim": _WIDTH, "norm_num_groups": 8, "sample_size": _SIZE}


def base_model() -> UNet2DConditionModel:
    """Return a UNet a quarter as wide as that of Stable Diffusion 1.5, with heads of the same width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # In diffusers `attention_head_dim` is the number of heads.
        model = UNet2DConditionModel(block_out_channels=(80, 160, 320, 320), attention_head_dim=2, **_COMMON)
    return model.eval().requires_grad_(False)


def module() -> TimeFreeUNet2DConditionModel:
    """Return a module a quarter as wide as the smaller of One More Step's released ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = TimeFreeUNet2DConditionModel(
            block_out_channels=(40, 80, 160), attention_head_dim=(1, 2, 5), **_COMMON,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def start(name: str) -> InitialNoise | None:
    """Return what is put into the slot of the pipeline."""
    if name == OMS:
        return OneMoreStep(module())
    return TerminalPrior(ResidualStatistics([0.0] * 4, (0.04 * torch.eye(4)).tolist())) if name == PRIOR else None


def pipeline() -> Any:
    """Return a stock pipeline of the base model."""
    scheduler = DDIMScheduler(**SCHEDULE, steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=base_model(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, initial_noise: InitialNoise | None, steps: int) -> tuple[float, float]:
    """Draw one image with classifier-free guidance, and return the seconds until the first evaluation, and in all."""
    states = torch.randn(2, 1, _TOKENS, _WIDTH, generator=torch.Generator().manual_seed(0))
    evaluations: list[float] = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: evaluations.append(time.process_time()))
    with guide(pipe, initial_noise=initial_noise):
        began = time.process_time()
        pipe(
            prompt_embeds=states[0], negative_prompt_embeds=states[1], num_inference_steps=steps, height=8 * _SIZE,
            width=8 * _SIZE, output_type="latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        ended = time.process_time()
    hook.remove()
    return evaluations[0] - began, ended - began


def measure(pipe: Any, starts: dict[str, InitialNoise | None], steps: int, rounds: int) -> dict[str, Any]:
    """Return seconds of whole calls and of the part before the first evaluation, by start.

    Args:
        pipe: of [`pipeline`].
        starts (`dict[str, InitialNoise | None]`): one of them white noise, which the others are compared with.
        steps (`int`): of a call.
        rounds (`int`): in each, every other start is called twice, between two calls of white noise.

    Returns:
        For each start but white noise `whole` and `before`: lists of (seconds of white noise, seconds of it), each the
        mean of two calls; and `network`, the seconds of the module by itself, each after a call, so that its weights
        are as cold as within one.
    """
    found: dict[str, Any] = {name: {"whole": [], "before": []} for name in starts if name != WHITE}
    found["network"] = []
    network: Any = starts[OMS].module  # type: ignore[union-attr]
    sample, states = torch.randn(1, 4, _SIZE, _SIZE), torch.randn(1, _TOKENS, _WIDTH)
    for initial_noise in starts.values():
        call(pipe, initial_noise, 1)  # to warm up
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        for name, of_start in found.items():
            if name == "network":
                continue
            first, *ours, last = (call(pipe, starts[which], steps) for which in (WHITE, name, name, WHITE))
            for number, kind in enumerate(("before", "whole")):
                pair = [statistics.fmean(times[number] for times in both) for both in ((first, last), ours)]
                of_start[kind].append(pair)
            began = time.process_time()
            with torch.no_grad():
                network(sample, states)
            found["network"].append(time.process_time() - began)
    return found


def operations(base: Any, network: Any) -> tuple[int, int]:
    """Return the floating-point operations of one evaluation of each, for one sample."""
    sample, states = torch.zeros(1, 4, _SIZE, _SIZE), torch.zeros(1, _TOKENS, _WIDTH)
    counts = []
    for evaluate in (lambda: base(sample, 0, states), lambda: network(sample, states)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            evaluate()
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def peak_memory(name: str) -> int:
    """Return the bytes that a new process which draws one image from a start has at most."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_draw_one, name).result()


def _draw_one(name: str) -> int:
    import resource
    import sys

    torch.set_num_threads(1)
    call(pipeline(), start(name), 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def median_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and its standard error, from the quartiles, as those of normal numbers."""
    if len(values) < 2:
        return values[0], math.nan
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    # A standard deviation is the distance of the quartiles / 1.349, and the error of a median 1.2533 of it / sqrt(n).
    return middle, 1.2533 * (high - low) / 1.349 / math.sqrt(len(values))


def summary(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return, of each start, the overhead of a call and its error, and what it adds before the first evaluation."""
    summed: dict[str, dict[str, float]] = {}
    for name in (OMS, PRIOR):
        whole, before = found[name]["whole"], found[name]["before"]
        overhead, error = median_and_error([ours / white - 1 for white, ours in whole])
        white = statistics.median(white for white, _ in whole)
        added = statistics.median(ours - stock for stock, ours in before)
        summed[name] = {"seconds": white, "overhead": overhead, "error": error, "added": added / white}
    return summed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; exit code 1 if One More Step costs more than its operations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6, help="in which each start is called twice")
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    folder: Path = output_folder(given.output_dir)
    torch.set_num_threads(1)
    # First, while this process is small: on Linux the largest memory of a new process is at least that of its parent.
    peaks = {name: peak_memory(name) for name in (WHITE, OMS, PRIOR)}
    pipe, starts = pipeline(), {name: start(name) for name in (WHITE, OMS, PRIOR)}
    network: Any = starts[OMS].module  # type: ignore[union-attr]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    flops = operations(pipe.unet, network)
    # The base evaluates two rows at each step, of the prompt and without it.
    share = flops[1] / (2 * given.steps * flops[0])
    found = measure(pipe, starts, given.steps, given.rounds)
    by_start = summary(found)
    of = by_start[OMS]
    alone = statistics.median(found["network"]) / of["seconds"]
    header = ["start", "operations, %", "network alone, %", "before 1st step, %", "whole call, %", "peak memory, MB"]
    rows = [
        [name, *((f"{100 * share:.2f}", f"{100 * alone:.2f}") if name == OMS else ("0", "0")),
         f"{100 * one['added']:+.3f}", f"{100 * one['overhead']:+.2f} ± {100 * one['error']:.2f}",
         f"{(peaks[name] - peaks[WHITE]) / 1e6:+.1f}"]
        for name, one in by_start.items()
    ]  # fmt: skip
    title = f"added to a call of {given.steps} steps, {of['seconds']:.2f} s of one thread"
    reporting.print_table(title, header, rows)
    beside, prior, grown = of["added"] - alone, by_start[PRIOR]["added"], peaks[OMS] - peaks[WHITE]
    checks = [
        (f"overhead of a call {of['overhead']:.4f} <= {share:.4f} of operations + {TOLERANCE}",
         of["overhead"] <= share + TOLERANCE),
        (f"standard error of the overhead {of['error']:.4f} <= {SETTLED}", of["error"] <= SETTLED),
        (f"beside the network {beside:.5f} of a call <= {BESIDE}", beside <= BESIDE),
        (f"terminal prior {prior:.5f} of a call <= {BESIDE}", prior <= BESIDE),
        (f"peak memory grows by {grown / 1e6:.1f} MB <= {1 + MEMORY_TOLERANCE} x {weights / 1e6:.1f} MB of weights",
         grown <= (1 + MEMORY_TOLERANCE) * weights),
    ]  # fmt: skip
    judged = reporting.judge(checks)
    content = {
        "seconds": found, "by_start": by_start, "operations": flops, "share": share, "network_share": alone,
        "peak_memory": peaks, "weights": weights, "acceptance": [list(check) for check in checks],
        "steps": given.steps,
    }  # fmt: skip
    path = folder / "one_more_step_overhead.json"
    reporting.write_json(path, {**reporting.circumstances([0]), **content})
    text = "\n".join([f"{title[0].upper()}{title[1:]}:\n", reporting.markdown(header, rows), judged])
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return int(not all(passed for _, passed in checks))


if __name__ == "__main__":
    raise SystemExit(main())
