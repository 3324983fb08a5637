"""Ratios of the benchmarks of preference learning, taken from their JSON."""

from __future__ import annotations

from typing import Any

from hfnoise.benchmarks.comparison import PEER, STOCK, Comparison, Ratio, geometric, median, paired, percent

_TOLD = "TRL, loss_type='robust', told the rate"


def trainer(found: dict[str, Any]) -> list[Comparison]:
    """Return wrong held-out pairs after whole runs, of both Trainers that are not told the flip rate."""
    wrong = {cell: [1 - accuracy for accuracy in runs] for cell, runs in found["results"].items()}
    rows = []
    for method, ours in (("RobustDPOTrainer", "RobustDPO, rate unknown"), ("DrDPOTrainer", "Dr. DPO, rate unknown")):
        for rate in ("0.3", "0.0"):
            others = [("trl.DPOTrainer", STOCK, "DPO")]
            # Told that no label is flipped, TRL's robust loss is DPO.
            others += [(_TOLD, PEER, "TRL robust, true rate")] if rate != "0.0" else []
            for against, kind, other in others:
                if not {f"{ours} | {rate}", f"{other} | {rate}"} <= wrong.keys():  # the small size runs a part
                    continue
                mine, theirs = wrong[f"{ours} | {rate}"], wrong[f"{other} | {rate}"]
                quantity = f"wrong held-out pairs, {float(rate):.0%} of labels flipped"
                rows.append(
                    Comparison(method, quantity, against, kind, percent(mine), percent(theirs), paired(mine, theirs))
                )
    return rows


def features(found: dict[str, Any]) -> list[Comparison]:
    """Return wrong held-out pairs on frozen features at 30 % flips, of the losses that are told nothing."""
    runs = found["results"]["trained"]

    def wrong(title: str) -> list[float]:
        return [1 - one["accuracy"] for one in runs[title]["0.3"]]

    return [
        Comparison(
            method, "wrong held-out pairs on frozen features, 30% of labels flipped", against, kind,
            percent(wrong(title)), percent(wrong(other)), paired(wrong(title), wrong(other)),
        )
        for method, title in (
            ("loss_type='sym', sym_temperature=4", "sym, temperature 4 [nothing]"),
            ("loss_type='forward_corrected', rate estimated", "forward_corrected [estimated rate]"),
        )
        for against, kind, other in (
            ("TRL, loss_type='sigmoid'", STOCK, "sigmoid (DPO)"), (_TOLD, PEER, "robust [true rate]"),
        )
    ]  # fmt: skip


def overhead(found: dict[str, Any]) -> list[Comparison]:
    """Return the time of a step beside TRL's own loss, over all our losses."""
    costs = found["results"]
    times = [one["step_time"] for name, one in costs.items() if not name.startswith("TRL")]
    ratio = geometric(times, "losses")
    return [
        Comparison("NoiseDPOTrainer, any loss", "time of a step", "trl.DPOTrainer", STOCK,
                   f"{ratio.value:.3f}", "1", ratio),
    ]  # fmt: skip


def dr_dpo(found: dict[str, Any]) -> list[Comparison]:
    """Return how far the gradient of a split batch is from that of the whole."""
    row = found["results"]["split_errors"]["1 x 1 x 16"]
    ours = row["ours, dr_beta 0.2"]
    return [
        Comparison(
            "DrDPOTrainer", "error of the gradient, one pair per micro-batch", against, kind,
            f"{ours:.1e}", f"{theirs:.1e}", Ratio(ours / theirs, spread="exact, no seeds"),
        )
        for against, kind, theirs in (
            ("rounding error of plain DPO", STOCK, row["DPO"]),
            ("official code of Dr. DPO", PEER, row["official, dr_beta 0.2"]),
        )
    ]  # fmt: skip


def prefix_sharing(found: dict[str, Any]) -> list[Comparison]:
    """Return the time of rows that share their prompt, beside padded and packed rows."""
    rows = []
    for case, ways in found["results"].items():
        ours = ways["tree"]["seconds"]
        for against, kind, way in (
            ("two padded passes", STOCK, "padded, two passes"), ("packed rows", PEER, "packed"),
        ):  # fmt: skip
            theirs = ways[way]["seconds"]
            rows.append(
                Comparison(
                    "prefix_sharing=True", f"time of a step, {case.partition(': ')[2]}", against, kind,
                    f"{ours:.2f} s", f"{theirs:.2f} s", Ratio(ours / theirs, spread="best of its repeats"),
                )
            )  # fmt: skip
    return rows


def bvpo_runs(found: dict[str, Any]) -> list[Comparison]:
    """Return wrong answers after whole runs, with traces and without."""
    runs = found["results"]
    rows = []
    for mode, words in (("think", "with traces"), ("nothink", "without traces")):
        ours, theirs = ([1 - one for one in runs[name][mode]] for name in ("auto", "union = DPO on both (0.5)"))
        rows.append(
            Comparison(
                "BVPOTrainer", f"wrong answers {words}", "trl.DPOTrainer on both datasets", STOCK,
                percent(ours), percent(theirs), paired(ours, theirs),
            )
        )  # fmt: skip
    return rows


def bvpo_gradients(found: dict[str, Any]) -> list[Comparison]:
    """Return the squared error of the gradient beside the union of both datasets."""
    errors = found["results"]["errors"]
    ours, theirs = errors[f"{found['results']['auto']:.3f}"], errors["0.500"]
    scale = errors["1.000"]
    return [
        Comparison(
            "BVPOTrainer", "squared error of the gradient", "trl.DPOTrainer on both datasets", STOCK,
            f"{ours / scale:.3f}", f"{theirs / scale:.3f}", Ratio(ours / theirs, spread="one set of prompts"),
        )
    ]  # fmt: skip


def displacement(found: dict[str, Any]) -> list[Comparison]:
    """Return what CHES adds to the pass of the reference model."""
    cost = found["results"]["reference_pass"]
    return [
        Comparison(
            "CHES scores", "time of the reference pass", "the pass without scores", STOCK,
            f"{cost['seconds_with']:.2f} s", f"{cost['seconds_without']:.2f} s", median(cost["ratios"], "passes"),
        )
    ]  # fmt: skip
