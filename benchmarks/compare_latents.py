"""Ratios of the benchmarks of starting noise and diffusion training, taken from their JSON."""

from __future__ import annotations

from typing import Any

from hfnoise.benchmarks.compare_guidance import WORLDS
from hfnoise.benchmarks.comparison import PEER, STOCK, Comparison, Ratio, median, of_summaries, paired, percent
from hfnoise.benchmarks.reporting import mean_and_error

_WITH_PRIOR = "with terminal prior"
# Other bases, which a user of a given one has not.
_OFFSET = ("base retrained with offset noise", PEER, "base retrained with offset noise")
_ZERO_SNR = ("base retrained at zero SNR", PEER, "base retrained at zero SNR")


def one_more_step(found: dict[str, Any]) -> list[Comparison]:
    """Return the error of the brightness with DDIM, beside white noise, the official code and retrained bases."""

    def errors(start: str) -> list[float]:
        return [run["DDIM"][start]["error"] for run in found["runs"]]

    return [
        _brightness(method, "error of the brightness, exact base", against, kind, errors(ours), errors(theirs))
        for method, ours, against, kind, theirs in (
            ("OneMoreStep", "One More Step", "white noise", STOCK, "white noise"),
            ("OneMoreStep", "One More Step", "official code of One More Step", PEER, "code of One More Step"),
            ("OneMoreStep", "One More Step", *_OFFSET), ("OneMoreStep", "One More Step", *_ZERO_SNR),
            ("OneMoreStep + TerminalPrior", _WITH_PRIOR, "white noise", STOCK, "white noise"),
            ("OneMoreStep + TerminalPrior", _WITH_PRIOR, "official code of One More Step", PEER,
             "code of One More Step"),
            ("OneMoreStep + TerminalPrior", _WITH_PRIOR, *_ZERO_SNR),
        )
    ]  # fmt: skip


def one_more_step_digits(found: dict[str, Any]) -> list[Comparison]:
    """Return the error of the brightness of dark and bright prompts over all scales, and of grey ones."""

    def errors(start: str, backgrounds: tuple[str, ...]) -> list[float]:
        return [
            mean_and_error([scale[one][start]["error"] for scale in run.values() for one in backgrounds])[0]
            for run in found["runs"]
        ]

    rows = []
    for words, backgrounds in (("dark and bright prompts", ("dark", "bright")), ("grey prompts", ("grey",))):
        for method, ours in (("OneMoreStep", "One More Step"), ("OneMoreStep + TerminalPrior", _WITH_PRIOR)):
            rows.append(
                _brightness(
                    method, f"error of the brightness, {words}", "white noise", STOCK,
                    errors(ours, backgrounds), errors("white noise", backgrounds),
                )
            )  # fmt: skip
    return rows


def _brightness(
    method: str, quantity: str, against: str, kind: str, ours: list[float], theirs: list[float]
) -> Comparison:
    means = [f"{mean_and_error(values)[0]:.3f}" for values in (ours, theirs)]
    return Comparison(method, quantity, against, kind, means[0], means[1], paired(ours, theirs))


def one_more_step_overhead(found: dict[str, Any]) -> list[Comparison]:
    """Return the time of a whole call."""
    rows = []
    for method, start in (("OneMoreStep", "One More Step"), ("TerminalPrior", "terminal prior")):
        seen = found["by_start"][start]
        ratio, error = 1 + seen["overhead"], seen["error"]
        rows.append(
            Comparison(
                method, "time of a call", "white noise", STOCK, f"{100 * seen['overhead']:+.2f} %",
                f"{seen['seconds']:.2f} s", Ratio(ratio, ratio - error, ratio + error, "s.e. of its rounds"),
            )
        )  # fmt: skip
    return rows


def golden_noise(found: dict[str, Any]) -> list[Comparison]:
    """Return wrong digits and the Fréchet distance without guidance, beside plain noise and the nearest plain run."""
    results, spread = found["results"], f"s.e. of {len(found['seeds'])} seeds"
    refined, world = results["refined"]["1.0"], WORLDS[found["settings"]["checkpoint"]]
    steps = found["settings"]["steps"]
    rows = []
    for method in ("ReDenoise", "NoisePromptNet"):
        ours = refined[method]
        # Guided with fewer steps: what the same evaluations buy without any refinement.
        for against, kind, other in (
            ("plain noise", STOCK, f"CFG 1, {steps} steps"),
            ("plain guidance, no more evaluations", PEER, ours["nearest_plain"]),
        ):
            theirs = results["plain"][other]
            wrong = [{"mean": 1 - one["judge_accuracy"]["mean"], "error": one["judge_accuracy"]["error"]}
                     for one in (ours, theirs)]  # fmt: skip
            rows.append(
                Comparison(
                    method, f"wrong images, no guidance, {world}", against, kind,
                    f"{100 * wrong[0]['mean']:.1f} %", f"{100 * wrong[1]['mean']:.1f} %",
                    of_summaries(wrong[0], wrong[1], spread),
                )
            )  # fmt: skip
            near = [one["frechet_distance"] for one in (ours, theirs)]
            rows.append(
                Comparison(
                    method, f"Fréchet distance, no guidance, {world}", against, kind, f"{near[0]['mean']:.2f}",
                    f"{near[1]['mean']:.2f}", of_summaries(near[0], near[1], spread),
                )
            )  # fmt: skip
    return rows


def noise_search(found: dict[str, Any]) -> list[Comparison]:
    """Return wrong digits of the searches of four images' evaluations."""
    wrong = {name: [1 - one["judge_accuracy"] for one in runs] for name, runs in found["runs"].items()}
    return [
        Comparison(
            method, "wrong images, evaluations of 4 images", against, kind, percent(wrong[ours]),
            percent(wrong[theirs]), paired(wrong[ours], wrong[theirs]),
        )
        for method, ours, against, kind, theirs in (
            ("RandomSearch", "best of 4", "one plain image", STOCK, "plain"),
            ("ZeroOrderSearch", "zero-order, 4", "best of 4", PEER, "best of 4"),
            ("PathSearch", "paths, 4", "best of 4", PEER, "best of 4"),
        )
    ]  # fmt: skip


def diffusion_trainer(found: dict[str, Any]) -> list[Comparison]:
    """Return the time of a step, with the loop's options and with all of the Trainer's."""
    loop = found["seconds"]["accelerate loop"]
    return [
        Comparison(
            name, "time of a step", "a loop written with accelerate", STOCK,
            f"{1000 * median(seconds, '').value:.1f} ms", f"{1000 * median(loop, '').value:.1f} ms",
            median([ours / theirs for ours, theirs in zip(seconds, loop, strict=True)], "pairs"),
        )
        for name, seconds in found["seconds"].items()
        if name != "accelerate loop"
    ]  # fmt: skip
