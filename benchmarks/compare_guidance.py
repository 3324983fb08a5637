"""Ratios of the benchmarks of guidance, taken from their JSON."""

from __future__ import annotations

import re
from typing import Any

from hfnoise.benchmarks.comparison import PEER, STOCK, Comparison, Ratio, of_summaries, paired, percent
from hfnoise.benchmarks.reporting import mean_and_error

_ADAPTIVE = "Adaptive Guidance, 0.99"
_NAME = "AdaptiveGuidance(threshold=0.99)"
_SETTING = "20 steps, scale 4"
WORLDS = {"digits-sd": "digits", "coloured-digits-sd": "coloured digits", "digits-sd-weak": "digits, weak model"}
_FULL = "full CFG"
# Those that spend what Adaptive Guidance spent; the number follows from it and differs from run to run.
_FEWER, _CUT = re.compile(r"CFG, \d+ steps"), re.compile(r"CFG in the first \d+ steps")


def digits(found: dict[str, Any]) -> list[Comparison]:
    """Return evaluations and wrong digits beside full guidance, and the distance to it beside others that skip."""
    runs, world = found["runs"][_SETTING], WORLDS[found["checkpoint"]]

    def values(name: str, key: str) -> list[float]:
        return [one[key] for one in runs[name]]

    def mean(name: str, key: str) -> float:
        return mean_and_error(values(name, key))[0]

    rows = [
        Comparison(
            _NAME, f"evaluations an image, {world}", "full guidance", STOCK,
            f"{mean(_ADAPTIVE, 'evaluations'):.1f}", f"{mean(_FULL, 'evaluations'):.1f}",
            paired(values(_ADAPTIVE, "evaluations"), values(_FULL, "evaluations")),
        )
    ]  # fmt: skip
    ours, theirs = ([1 - one for one in values(name, "verifier_accuracy")] for name in (_ADAPTIVE, _FULL))
    # Where nearly every digit is right there is nothing to take a ratio of.
    if mean_and_error(theirs)[0] > 0.02:
        rows.append(
            Comparison(
                _NAME, f"wrong images, {world}", "full guidance", STOCK, percent(ours),
                percent(theirs), paired(ours, theirs),
            )
        )  # fmt: skip
    for against, pattern in (("a fixed cut-off, as many evaluations", _CUT), ("fewer steps of full guidance", _FEWER)):
        other = next(name for name in runs if pattern.fullmatch(name))
        rows.append(
            Comparison(
                _NAME, f"distance to full guidance, {world}", against, PEER,
                f"{mean(_ADAPTIVE, 'latent_error'):.3f}", f"{mean(other, 'latent_error'):.3f}",
                paired(values(_ADAPTIVE, "latent_error"), values(other, "latent_error")),
            )
        )  # fmt: skip
    return rows


def wall_clock(found: dict[str, Any]) -> list[Comparison]:
    """Return the time of a call in a batch, and beside the callback of diffusers for one image."""
    times, peers = found["times"][_SETTING], found["peers"]["time_saved"]
    ours, full = times[_ADAPTIVE]["seconds"], times[_FULL]["seconds"]
    alone = {name: 1 - saved for name, saved in peers.items()}
    mine, theirs = alone["ours, stop at the same step"], alone["SDCFGCutoffCallback"]
    return [
        Comparison(
            _NAME, "time of a call, digits", "full guidance", STOCK, f"{ours:.2f} s", f"{full:.2f} s",
            Ratio(1 - times[_ADAPTIVE]["time_saved"], spread="median of its repeats"),
        ),
        Comparison(
            "AdaptiveGuidance, stopped at the same step", "time of a call, one image, digits", "SDCFGCutoffCallback",
            PEER,
            f"{mine:.2f} of full", f"{theirs:.2f} of full", Ratio(mine / theirs, spread="median of its repeats"),
        ),
    ]  # fmt: skip


def mixture(found: dict[str, Any]) -> list[Comparison]:
    """Return the distance to full guidance at three quarters of the evaluations, the denoiser being exact."""
    by_setting: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in found["runs"]:
        for run in seed:
            by_setting.setdefault((run["method"], run["setting"]), []).append(run)
    # 30 of 40: where guidance is left out in the second half of the steps.
    nearest: dict[str, list[dict[str, float]]] = {}
    for (method, _), runs in by_setting.items():
        gap = abs(mean_and_error([one["evaluations"] for one in runs])[0] - 30)
        if method not in nearest or gap < abs(mean_and_error([one["evaluations"] for one in nearest[method]])[0] - 30):
            nearest[method] = runs
    ours = [one["error"] for one in nearest["Adaptive Guidance on x0"]]
    rows = []
    for against, method in (
        ("a fixed cut-off", "fixed cut-off"),
        ("fewer steps of full guidance", "CFG, fewer steps"),
    ):
        theirs = [one["error"] for one in nearest[method]]
        rows.append(
            Comparison(
                "AdaptiveGuidance on x0", "distance to full guidance, exact denoiser",
                against, PEER, percent(ours), percent(theirs),
                paired(ours, theirs),
            )
        )  # fmt: skip
    return rows


def saturation(found: dict[str, Any]) -> list[Comparison]:
    """Return saturation and wrong digits at scale 15, beside CFG and the better setting of diffusers' APG."""
    summary, world = found["summary"], WORLDS[found["checkpoint"]]
    spread = f"s.e. of {len(found['seeds'])} seeds"
    theirs = min(
        (name for name in summary if name.startswith("APG of diffusers") or name.startswith("the same")),
        key=lambda name: summary[name]["15"]["saturation"]["mean"],
    )
    rows = [
        Comparison(
            "ProjectedGuidance", f"saturation at scale 15, {world}", against, kind,
            f"{summary['APG, ours']['15']['saturation']['mean']:.3f}",
            f"{summary[name]['15']['saturation']['mean']:.3f}",
            of_summaries(summary["APG, ours"]["15"]["saturation"], summary[name]["15"]["saturation"], spread),
        )
        for against, kind, name in (("CFG", STOCK, "CFG"), ("diffusers' APG, its best setting", PEER, theirs))
    ]  # fmt: skip
    for against, kind, name in (("CFG", STOCK, "CFG"), ("diffusers' APG, its best setting", PEER, theirs)):
        mine, other = (
            [1 - one["verifier_accuracy"] for one in found["runs"][way]["15"]] for way in ("APG, ours", name)
        )
        if mean_and_error(other)[0] > 0.02:
            rows.append(
                Comparison(
                    "ProjectedGuidance", f"wrong images at scale 15, {world}", against, kind,
                    percent(mine), percent(other),
                    paired(mine, other),
                )
            )  # fmt: skip
    return rows


def overhead(found: dict[str, Any]) -> list[Comparison]:
    """Return the time of a step with the costliest guider."""
    step = found["step_seconds"]
    name, guider = max(found["guiders"].items(), key=lambda item: item[1]["added_microseconds"])
    rule = found["rule"]["microseconds"]
    ours, theirs = rule["ours on the model's output, as diffusers"], rule["diffusers' AdaptiveProjectedGuidance"]
    return [
        Comparison(
            name, "time of a step", "stock pipeline", STOCK, f"+ {guider['added_microseconds']:.0f} µs",
            f"{step:.2f} s", Ratio(1 + guider["added_microseconds"] / 1e6 / step, spread="one measurement"),
        ),
        Comparison(
            "ProjectedGuidance, its rule alone", "time of the rule", "diffusers' APG", PEER, f"{ours:.0f} µs",
            f"{theirs:.0f} µs", Ratio(ours / theirs, spread="median of its repeats"),
        ),
    ]  # fmt: skip
