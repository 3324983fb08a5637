"""Ratios of the benchmarks of private and federated training, taken from their JSON."""

from __future__ import annotations

from typing import Any

from hfnoise.benchmarks.comparison import PEER, STOCK, Comparison, Ratio, geometric, median, paired, percent
from hfnoise.benchmarks.reporting import mean_and_error

_OPACUS = "opacus"


def docstrings(found: dict[str, Any]) -> list[Comparison]:
    """Return perplexity at each budget, and without noise, beside training without privacy."""
    theirs = [one["perplexity"] for one in found["results"]["no privacy"]]
    rows = []
    for name, runs in found["results"].items():
        if name == "no privacy":
            continue
        ours = [one["perplexity"] for one in runs]
        rows.append(
            Comparison(
                f"DPSFTTrainer, {name}", "perplexity on held-out private code", "trl.SFTTrainer, no privacy", STOCK,
                f"{mean_and_error(ours)[0]:.1f}", f"{mean_and_error(theirs)[0]:.1f}", paired(ours, theirs),
            )
        )  # fmt: skip
    return rows


def step_time(found: dict[str, Any]) -> list[Comparison]:
    """Return the time of a clipped step beside an ordinary one and both modes of Opacus."""
    cases = found["results"].values()
    rows = []
    for against, kind, way, package in (
        ("an ordinary LoRA step", STOCK, "ordinary", ""),
        ("Opacus, hooks", PEER, "Opacus hooks", _OPACUS),
        ("Opacus, ghost clipping", PEER, "Opacus ghost", _OPACUS),
    ):
        if any(way not in case for case in cases):
            continue
        ratios = [case["hfnoise"]["time"] / case[way]["time"] for case in cases]
        ours, theirs = (geometric([case[one]["milliseconds"] for case in cases], "").value for one in ("hfnoise", way))
        rows.append(
            Comparison(
                "clipping per row", "time of a LoRA step", against, kind, f"{ours:.0f} ms", f"{theirs:.0f} ms",
                geometric(ratios, "models"), package,
            )
        )  # fmt: skip
    return rows


def trainer_time(found: dict[str, Any]) -> list[Comparison]:
    """Return the time of a whole step of the private Trainer."""
    stock = found["seconds"]["trl.SFTTrainer"]
    rows = []
    for name, seconds in found["seconds"].items():
        if name == "trl.SFTTrainer":
            continue
        # As in the benchmark's own table: each by the mean of the stock steps, whose runs are not paired with ours.
        theirs = mean_and_error(stock)[0]
        ratios = [one / theirs for one in seconds]
        rows.append(
            Comparison(
                name, "time of a whole step", "trl.SFTTrainer", STOCK, f"{mean_and_error(seconds)[0]:.2f} s",
                f"{theirs:.2f} s", median(ratios, "runs"),
            )
        )  # fmt: skip
    return rows


def fedsvd(found: dict[str, Any]) -> list[Comparison]:
    """Return wrong answers of FedSVD's two forms, and what FedEx-LoRA sends beside it."""
    runs = found["results"]
    rows = []
    for method in ("FedSVD", "FedSVD + refresh"):
        peers = ("FFA-LoRA (orthonormal)", "FFA-LoRA (Kaiming)", "FedEx-LoRA", "FLoRA")
        for against, kind in (("FedAvg", STOCK), *((peer, PEER) for peer in peers)):
            if method not in runs or against not in runs:
                continue
            for privacy in runs[method]:
                ours, theirs = ([1 - one["accuracy"] for one in runs[name][privacy]] for name in (method, against))
                rows.append(
                    Comparison(
                        method, f"wrong answers, {privacy}", against, kind, percent(ours), percent(theirs),
                        paired(ours, theirs),
                    )
                )  # fmt: skip
    return rows + _bytes(runs)


def _bytes(runs: dict[str, Any]) -> list[Comparison]:
    """Return the largest number of bytes that a client is sent in a round."""
    sent = {name: max(by_privacy["no privacy"][0]["bytes_down"]) for name, by_privacy in runs.items()}
    return [
        Comparison(
            "FedSVD", "bytes to a client in a round", against, kind, f"{sent['FedSVD']:,}", f"{sent[against]:,}",
            Ratio(sent["FedSVD"] / sent[against], spread="exact"),
        )
        for against, kind in (("FedAvg", STOCK), ("FedEx-LoRA", PEER))
        if {"FedSVD", against} <= sent.keys()
    ]  # fmt: skip


def rotation(found: dict[str, Any]) -> list[Comparison]:
    """Return the time of the refactorisation over all shapes, beside two kinds of SVD."""
    cases = [case["costs"] for case in found["results"].values()]
    rows = []
    for against, kind, way in (
        ("full SVD, as the official code", STOCK, "full SVD of B A"),
        ("randomised SVD", PEER, "randomised SVD of B A"),
    ):
        ratios = [case["rotate_lora"]["seconds"] / case[way]["seconds"] for case in cases]
        ours, theirs = (geometric([case[one]["seconds"] for case in cases], "").value for one in ("rotate_lora", way))
        rows.append(
            Comparison(
                "rotate_lora", "time of a refactorisation", against, kind, f"{1000 * ours:.2f} ms",
                f"{1000 * theirs:.2f} ms", geometric(ratios, "shapes"),
            )
        )  # fmt: skip
    return rows
