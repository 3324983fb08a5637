"""What guidance itself costs: everything of ours in a step of Stable Diffusion, against the step.

`python -m hfnoise.benchmarks.guidance_overhead` times two things: a step of the UNet of Stable Diffusion 1.5 (860 M
parameters, random weights, two rows of 64 x 64 latents), and the same pipeline around a denoiser that returns at once,
with and without a guider. Their difference is all that is ours, hooks and rules, and is not lost in the noise of the
step. APG's rule alone is timed beside that of diffusers, in float32 and float64. It writes guidance_overhead.json and
.md. All on one thread of the CPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from torch.utils._python_dispatch import TorchDispatchMode

from hfnoise.benchmarks.guidance_runs import paired_times
from hfnoise.benchmarks.reporting import circumstances, judge, markdown, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.guidance import DenoisingPoint, MomentumState, projected_output_update, projected_update
from hfnoise.pipelines import AdaptiveGuidance, LinearGuidance, ProjectedGuidance, guide

# Of a step.
MOST_OVERHEAD = 0.01
# Of float32 arithmetic, in units of the largest entry of the update.
MOST_ERROR = 2e-6
STOCK = "stock pipeline"
_TOKENS, _WIDTH = 77, 768
# The APG rule is timed on four latents of SDXL.
_RULE_SHAPE = (4, 4, 128, 128)
# A value becomes a Python number, or decides on a shape.
_READS = ("aten._local_scalar_dense.default", "aten.nonzero.default")


class InstantUNet(UNet2DConditionModel):
    """A denoiser that returns at once what it was given beforehand: two predictions that never agree."""

    predictions: torch.Tensor

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        """Return as many rows as were asked for."""
        return (self.predictions[: len(sample)],)


def instant_pipeline(size: int) -> StableDiffusionPipeline:
    """Return Stable Diffusion with a denoiser that returns at once.

    Args:
        size (`int`): side of the latents.
    """
    unet = InstantUNet(
        sample_size=size, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, cross_attention_dim=_WIDTH,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None, attention_head_dim=4,
    )  # fmt: skip
    unet.predictions = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0))
    # Never called, but asked for its factor: latents are an eighth of the pixels.
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4, norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guiders() -> dict[str, Any]:
    """Return guiders that guide at every step, so that all of their work is done."""
    apg = {"norm_threshold": 7.5, "momentum": -0.75}
    return {
        STOCK: None,
        "AdaptiveGuidance": AdaptiveGuidance(min_steps=1.0),
        "ProjectedGuidance": ProjectedGuidance(**apg),
        "AdaptiveGuidance around ProjectedGuidance": AdaptiveGuidance(min_steps=1.0, inner=ProjectedGuidance(**apg)),
        "LinearGuidance, every second step": LinearGuidance(),
    }


def _run(pipe: Any, guider: Any, steps: int) -> None:
    size = pipe.unet.config.sample_size
    call = {
        "prompt_embeds": torch.zeros(1, _TOKENS, _WIDTH), "negative_prompt_embeds": torch.zeros(1, _TOKENS, _WIDTH),
        "latents": torch.zeros(1, 4, size, size), "num_inference_steps": steps, "guidance_scale": 7.5,
        "output_type": "latent",
    }  # fmt: skip
    if guider is None:
        pipe(**call)
    else:
        with guide(pipe, guider):
            pipe(**call)


def overhead(size: int, steps: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return microseconds per step that each guider adds, and values per step that the host reads of tensors.

    Where such a tensor is on a device, reading it is a wait: of these at most the mask of the samples that are guided
    and the timestep. The noise level of DDIM is on the CPU.

    Args:
        size (`int`): side of the latents.
        steps (`int`): of a run.
        repeats (`int`): runs of each.
    """
    pipe = instant_pipeline(size)
    every = guiders()
    seconds = paired_times({name: partial(_run, pipe, guider, steps) for name, guider in every.items()}, repeats)
    found = {}
    reads = {name: _reads(partial(_run, pipe, guider, steps)) for name, guider in every.items()}
    for name in every:
        added = [own - base for own, base in zip(seconds[name], seconds[STOCK], strict=True)]
        found[name] = {
            "microseconds": 1e6 * statistics.median(seconds[name]) / steps,
            "added_microseconds": 1e6 * statistics.median(added) / steps,
            "added_reads": (reads[name] - reads[STOCK]) / steps,
        }
    return found


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _reads(run: Callable[[], None]) -> int:
    with _Counting() as counting:
        run()
    return sum(counting.seen[name] for name in _READS)


def unet_step(shape: dict[str, Any], size: int, dtype: torch.dtype, repeats: int) -> tuple[float, int]:
    """Return the seconds of two rows through a UNet with random weights, and its number of parameters.

    Args:
        shape (`dict`): settings of `UNet2DConditionModel`; none are those of Stable Diffusion 1.5.
        size (`int`): side of the latents.
        dtype (`torch.dtype`): of weights and latents.
        repeats (`int`): evaluations that are timed.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{"cross_attention_dim": _WIDTH, "sample_size": size, **shape})
    unet = unet.to(dtype).to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(0, 0.02)
        sample = torch.randn(2, 4, size, size, dtype=dtype)
        text = torch.randn(2, _TOKENS, _WIDTH, dtype=dtype)
        seconds = paired_times({"step": lambda: unet(sample, 500, encoder_hidden_states=text)}, repeats)["step"]
    return statistics.median(seconds), sum(parameter.numel() for parameter in unet.parameters())


def rules(shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Return microseconds of APG's rule, ours and that of diffusers, and the error of float32.

    Args:
        shape (`tuple[int, ...]`): of a batch of latents.
        repeats (`int`): calls of each.
    """
    generator = torch.Generator().manual_seed(0)
    cond, uncond, noisy = torch.randn(3, *shape, generator=generator).unbind()
    uncond = cond + 0.3 * uncond
    point = DenoisingPoint.from_sigma("epsilon", 3.0)
    options: dict[str, Any] = {"eta": 0.0, "norm_threshold": 15.0}
    theirs = AdaptiveProjectedGuidance(
        adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=15.0, eta=0.0
    )
    theirs.set_state(0, 20, torch.tensor(999))
    states = {name: MomentumState(-0.5) for name in ("x0", "model", "double")}

    def stock() -> Any:
        theirs.momentum_buffer = theirs.momentum_buffer or MomentumBuffer(-0.5)
        return theirs.forward(cond, uncond)

    def ours() -> torch.Tensor:
        update = projected_output_update(cond, uncond, noisy, point, momentum_state=states["x0"], **options)
        return cond + 6.5 * update

    def in_model_space() -> torch.Tensor:
        return cond + 6.5 * projected_update(cond, uncond, momentum_state=states["model"], **options)

    wide: dict[str, Any] = {
        "cond": cond.double(), "uncond": uncond.double(), "model_input": noisy.double(), "point": point, **options
    }  # fmt: skip

    def double() -> torch.Tensor:
        update = projected_output_update(**wide, momentum_state=states["double"])
        return wide["cond"] + 6.5 * update

    runs: dict[str, Callable[[], Any]] = {
        "diffusers' AdaptiveProjectedGuidance": stock, "ours on x0": ours,
        "ours on the model's output, as diffusers": in_model_space, "ours on x0, float64": double,
    }  # fmt: skip
    seconds = paired_times(runs, repeats)
    narrow = projected_output_update(cond, uncond, noisy, point, **options)
    exact = projected_output_update(**wide)
    return {
        "microseconds": {name: 1e6 * statistics.median(one) for name, one in seconds.items()},
        "float32_error": float((narrow - exact).abs().max() / exact.abs().max()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; exit code 1 if an acceptance bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="side of the latents")
    parser.add_argument("--steps", type=int, default=50, help="of the runs with the instant denoiser")
    parser.add_argument("--repeats", type=int, default=21, help="turns of every guider and rule")
    parser.add_argument("--unet_repeats", type=int, default=3, help="evaluations of the UNet that are timed")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the UNet")
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet: to try the benchmark, not its claim")
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    folder: Path = output_folder(given.output_dir)
    torch.set_num_threads(1)
    costs = overhead(given.size, given.steps, given.repeats)
    rule = rules(_RULE_SHAPE, given.repeats)
    shape = {"block_out_channels": (32, 32, 32, 32)} if given.tiny else {}
    step, parameters = unet_step(shape, given.size, getattr(torch, given.dtype), given.unet_repeats)
    header = [
        "guider",
        "µs a step, instant denoiser",
        "added, µs",
        "of a step of the UNet, %",
        "added reads by the host a step",
    ]
    rows = [
        [
            name, f"{one['microseconds']:.0f}", f"{one['added_microseconds']:.0f}",
            f"{1e-4 * one['added_microseconds'] / step:.4f}", f"{one['added_reads']:.1f}",
        ]
        for name, one in costs.items()
    ]  # fmt: skip
    title = (
        f"{parameters / 1e6:.0f} M parameters, 2 rows of 4 x {given.size} x {given.size}, {given.dtype}: "
        f"{step:.2f} s a step"
    )
    print_table(title, header, rows)
    rule_header = [f"APG's rule, {' x '.join(map(str, _RULE_SHAPE))}", "µs"]
    rule_rows = [[name, f"{value:.0f}"] for name, value in rule["microseconds"].items()]
    print_table("APG's rule", rule_header, rule_rows)
    worst = max(one["added_microseconds"] for one in costs.values())
    share, error = 1e-6 * worst / step, rule["float32_error"]
    checks = [
        (f"largest overhead of a step {100 * share:.4f} % <= {100 * MOST_OVERHEAD:g} %", share <= MOST_OVERHEAD),
        (f"error of float32 to float64, of the update {error:.1e} <= {MOST_ERROR:g}", error <= MOST_ERROR),
    ]
    judged = judge(checks)
    shortest = f"The overhead stays within 1 % where a step takes {100 * worst / 1000:.0f} ms or more.\n"
    print(shortest)
    content = {
        "guiders": costs, "rule": rule, "step_seconds": step, "parameters": parameters, "dtype": given.dtype,
        "size": given.size, "acceptance": [list(check) for check in checks],
        "shortest_step_milliseconds": 100 * worst / 1000,
    }  # fmt: skip
    write_json(folder / "guidance_overhead.json", {**circumstances([0]), **content})
    text = f"{title}\n\n{markdown(header, rows)}\n{markdown(rule_header, rule_rows)}\n{judged}- {shortest}"
    (folder / "guidance_overhead.md").write_text(text, encoding="utf-8")
    return int(not all(passed for _, passed in checks))


if __name__ == "__main__":
    raise SystemExit(main())
