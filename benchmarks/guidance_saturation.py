"""Saturation against the guidance scale: APG, diffusers' APG, rescaled and plain classifier-free guidance.

`python -m hfnoise.benchmarks.guidance_saturation` draws a digits world at growing scales from the same noise and
writes guidance_saturation_digits.json, .md and .png (named after the checkpoint), and guidance_pictures_digits.png:
CFG, Adaptive Guidance and APG side by side. Saturation is the root mean square of the final latents above that of the
run without guidance; pixels that are clipped are counted too, but show little of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from tqdm.auto import tqdm

from hfnoise.benchmarks.guidance_pictures import side_by_side
from hfnoise.benchmarks.guidance_runs import Subject, add_subject_options, draw, load_subject, scores, summary
from hfnoise.benchmarks.reporting import circumstances, judge, markdown, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.pipelines import ProjectedGuidance
from hfnoise.pipelines.projected_guider import auto_norm_threshold

SCALES = (2.0, 4.0, 7.5, 15.0, 30.0)
# APG, arXiv 2410.02416, table 10: for SDXL.
MOMENTUM = -0.5
# Lin et al. 2023 (arXiv 2305.08891), section 3.4.
_RESCALE = 0.7
CFG, OURS = "CFG", "APG, ours"
# The claim: at this scale, not more than this share of the saturation of CFG, at an accuracy not lower than its.
CLAIM_SCALE, CLAIM_SHARE, ACCURACY_TOLERANCE = 15.0, 0.5, 0.01


class _StockProjected(ProjectedGuidance):
    """What `diffusers.AdaptiveProjectedGuidance` computes, by its own function, in a pipeline that takes none."""

    stock: dict[str, Any]

    @property
    def _is_neutral(self) -> bool:
        return False

    def _reset(self) -> None:
        momentum = self.stock["momentum"]
        self._buffer = None if momentum is None else MomentumBuffer(momentum)

    def _shape(self, update: torch.Tensor | None, step: Any) -> torch.Tensor:
        scale = step.guidance_scale
        guided = normalized_guidance(
            step.cond, step.uncond, scale, self._buffer, self.stock["eta"], self.stock["norm_threshold"],
            self.stock["use_original_formulation"],
        )  # fmt: skip
        return (guided - step.cond) / (scale - 1)


def stock_projected(
    eta: float = 1.0,
    norm_threshold: float = 15.0,
    momentum: float | None = None,
    use_original_formulation: bool = False,
) -> ProjectedGuidance:
    """Return a guider that computes what stock APG does; the defaults are its own.

    Args:
        eta, norm_threshold, momentum, use_original_formulation: of `diffusers.AdaptiveProjectedGuidance`.
    """
    guider = _StockProjected(space="model")
    guider.stock = {
        "eta": eta, "norm_threshold": norm_threshold, "momentum": momentum,
        "use_original_formulation": use_original_formulation,
    }  # fmt: skip
    return guider


@dataclass(frozen=True)
class Method:
    """How images are guided.

    Args:
        guider (*optional*): the pipeline's own guidance if `None`.
        call (`dict`): more arguments of the pipeline.
    """

    guider: Any = None
    call: dict[str, Any] = field(default_factory=dict)


def methods(size: int) -> dict[str, Method]:
    """Return all methods, for latents of `size` numbers."""
    threshold = auto_norm_threshold(size)
    paper: dict[str, Any] = {"eta": 0.0, "norm_threshold": threshold, "momentum": MOMENTUM}
    return {
        CFG: Method(),
        f"CFG, guidance_rescale={_RESCALE}": Method(call={"guidance_rescale": _RESCALE}),
        "APG of diffusers, its defaults": Method(stock_projected()),
        "APG of diffusers, options of the paper": Method(stock_projected(**paper)),
        "the same, use_original_formulation": Method(stock_projected(**paper, use_original_formulation=True)),
        OURS: Method(ProjectedGuidance(**paper)),
    }


def compare(
    subject: Subject, checkpoint: str, seeds: Sequence[int], images: int, steps: int, scales: Sequence[float]
) -> tuple[list[dict[str, float]], dict[str, dict[str, list[dict[str, float]]]]]:
    """Return the scores of the run without guidance by seed, and those of every method by scale and seed."""
    labels = subject.labels(images)
    unguided = [scores(draw(subject, labels, seed, steps, 1.0), labels, checkpoint) for seed in seeds]
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    every = methods(subject.noise(1, 0).numel())
    bar = tqdm(total=len(every) * len(scales), desc="methods and scales")
    for name, method in every.items():
        for scale in scales:
            runs = []
            for seed, base in zip(seeds, unguided, strict=True):
                drawn = draw(subject, labels, seed, steps, scale, method.guider, **method.call)
                one = scores(drawn, labels, checkpoint)
                runs.append({**one, "saturation": one["latent_rms"] - base["latent_rms"]})
            found.setdefault(name, {})[f"{scale:g}"] = runs
            bar.update()
    return unguided, found


def table(
    unguided: list[dict[str, float]], found: dict[str, dict[str, list[dict[str, float]]]]
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: means over seeds."""
    header = [
        "method", "scale", "saturation (latent RMS above unguided)", "clipped pixels, %", "verifier right, %",
        "judge right, %", "Fréchet distance", "diversity",
    ]  # fmt: skip

    def row(name: str, scale: str, runs: list[dict[str, float]]) -> list[str]:
        mean = {key: one["mean"] for key, one in summary(runs).items()}
        error = summary(runs).get("saturation", {}).get("error")
        saturation = f"{mean.get('saturation', 0.0):+.3f}" + ("" if error is None else f" ± {error:.3f}")
        shares = [f"{100 * mean[key]:.1f}" for key in ("clipped", "verifier_accuracy", "judge_accuracy")]
        return [name, scale, saturation, *shares, f"{mean['frechet_distance']:.2f}", f"{mean['diversity']:.2f}"]

    rows = [row("no guidance", "1", unguided)]
    rows += [row(name, scale, runs) for name, by_scale in found.items() for scale, runs in by_scale.items()]
    return header, rows


def acceptance(found: dict[str, dict[str, list[dict[str, float]]]]) -> list[tuple[str, bool]]:
    """Return what was claimed and whether it holds, if the scale of the claim was run."""
    scale = f"{CLAIM_SCALE:g}"
    if scale not in found[CFG]:
        return []
    plain, ours = (summary(found[name][scale]) for name in (CFG, OURS))
    share = ours["saturation"]["mean"] / plain["saturation"]["mean"]
    lost = plain["verifier_accuracy"]["mean"] - ours["verifier_accuracy"]["mean"]
    return [
        (f"scale {scale}: saturation of APG / of CFG {share:.3f} < {CLAIM_SHARE}", share < CLAIM_SHARE),
        (f"scale {scale}: verifier accuracy lost {lost:.4f} <= {ACCURACY_TOLERANCE}", lost <= ACCURACY_TOLERANCE),
    ]


def plot(unguided: list[dict[str, float]], found: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    """Write saturation, clipped pixels, accuracy and Fréchet distance against the scale."""
    from matplotlib.figure import Figure

    panels = {
        "saturation": "latent RMS above unguided", "clipped": "share of pixels clipped",
        "verifier_accuracy": "verifier right", "frechet_distance": "Fréchet distance",
    }  # fmt: skip
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for number, (name, by_scale) in enumerate(found.items()):
            means = [summary(runs)[key] for runs in by_scale.values()]
            axes.errorbar(
                [float(scale) for scale in by_scale], [one["mean"] for one in means],
                [one["error"] or 0.0 for one in means], marker="osv^DP"[number % 6], capsize=3, label=name,
                color=f"C{number}", linewidth={CFG: 5.0, OURS: 2.5}.get(name, 1.2),
                alpha=0.5 if name == CFG else 1.0,
            )  # fmt: skip
        level = 0.0 if key == "saturation" else summary(unguided)[key]["mean"]
        axes.axhline(level, color="0.5", linewidth=0.8, linestyle="--", label="no guidance")
        axes.set(xscale="log", xlabel="guidance scale", ylabel=label)
        ticks = [float(scale) for scale in next(iter(found.values()))]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        if key == "saturation":
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; exit code 1 if an acceptance bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise")
    parser.add_argument("--images", type=int, default=200, help="at least so many for each seed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scales", type=float, nargs="+", default=list(SCALES))
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    folder: Path = output_folder(given.output_dir)
    torch.set_num_threads(1)
    subject = load_subject(given.checkpoint, given.world)
    unguided, found = compare(subject, given.checkpoint, given.seeds, given.images, given.steps, given.scales)
    header, rows = table(unguided, found)
    print_table(f"saturation, {given.steps} steps", header, rows)
    checks = acceptance(found)
    judged = judge(checks)
    content = {
        "checkpoint": subject.name, "steps": given.steps, "images": len(subject.labels(given.images)),
        "norm_threshold": auto_norm_threshold(subject.noise(1, 0).numel()), "momentum": MOMENTUM, "unguided": unguided,
        "runs": found, "acceptance": [list(check) for check in checks],
        "summary": {
            name: {scale: summary(runs) for scale, runs in by_scale.items()} for name, by_scale in found.items()
        },
    }  # fmt: skip
    stem = f"guidance_saturation_{subject.stem}"
    write_json(folder / f"{stem}.json", {**circumstances(given.seeds), **content})
    (folder / f"{stem}.md").write_text(f"{markdown(header, rows)}\n{judged}", encoding="utf-8")
    plot(unguided, found, folder / f"{stem}.png")
    apg = ProjectedGuidance(norm_threshold="auto", momentum=MOMENTUM)
    side_by_side(subject, apg, given.seeds[0], given.steps, folder / f"guidance_pictures_{subject.stem}.png")
    return int(not all(passed for _, passed in checks))


if __name__ == "__main__":
    raise SystemExit(main())
