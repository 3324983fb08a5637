"""Ratios of the benchmarks of quantisation, taken from their JSON."""

from __future__ import annotations

from typing import Any

from hfnoise.benchmarks.comparison import PEER, STOCK, Comparison, Ratio, geometric, paired

_PACKAGES = {"torchao": "torchao", "bitsandbytes": "bitsandbytes"}


def training(found: dict[str, Any]) -> list[Comparison]:
    """Return held-out losses at each width, beside full precision and the best of the other methods."""
    results = found["results"]
    losses = {name: [run["loss"] for run in one["runs"]] for name, one in results.items()}
    rows = []
    for name in sorted(losses):
        method, _, bits = name.partition(" ")
        if method != "quest":
            continue
        # Ours without the rotation is no other method.
        others = [one for one in losses if one.endswith(f" {bits}") and one.split()[0] not in ("quest", "no_hadamard")]
        best = min(others, key=lambda one: results[one]["loss"], default=None)
        compared = [("full precision, transformers.Trainer", STOCK, "fp 32")]
        compared += [(_METHODS[best.split()[0]], PEER, best)] if best else []
        for against, kind, other in compared:
            if other not in losses:
                continue
            rows.append(
                Comparison(
                    f"QuEST {bits}", "held-out loss of a Llama from scratch", against, kind,
                    f"{results[name]['loss']:.3f}", f"{results[other]['loss']:.3f}",
                    paired(losses[name], losses[other]),
                )
            )  # fmt: skip
    return rows


_METHODS = {
    "lsq": "LSQ, its step rate tuned",
    "ste_rms": "STE on the RMS grid",
    "ste_absmax": "STE on the absmax grid",
    "bitnet": "BitNet b1.58 of transformers",
}


def kernels(found: dict[str, Any]) -> list[Comparison]:
    """Return the time of a layer on one thread, beside float32 and the fastest other way."""
    rows = []
    for case, ways in found["results"].items():
        shape, _, threads = case.rpartition(", ")
        if threads != "1 thread":
            continue
        others = {name: way["layer"] for name, way in ways.items() if not name.startswith(("hfnoise", "float32"))}
        fastest = min(others, key=lambda one: others[one])
        for bits in ("W1A1", "W4A4"):
            ours = ways[f"hfnoise {bits}"]["layer"]
            for against, kind, theirs in (
                ("nn.Linear, float32", STOCK, ways["float32"]["layer"]), (fastest, PEER, others[fastest]),
            ):  # fmt: skip
                rows.append(
                    Comparison(
                        f"packed layer, {bits}", f"time of a layer, {shape}", against, kind,
                        f"{1000 * ours:.3f} ms", f"{1000 * theirs:.3f} ms",
                        Ratio(ours / theirs, spread="fastest of its repeats"), _PACKAGES.get(fastest.split()[0], ""),
                    )
                )  # fmt: skip
    return rows


def step_time(found: dict[str, Any]) -> list[Comparison]:
    """Return the time of a training step of a layer at 1 bit, over all shapes."""
    cases = found["results"].values()
    rows = []
    for against, kind, way in (
        ("nn.Linear", STOCK, "nn.Linear"),
        ("AutoBitLinear of transformers", PEER, "transformers AutoBitLinear (BitNet)"),
    ):
        ratio = geometric([case["hfnoise, 1 bit"]["seconds"] / case[way]["seconds"] for case in cases], "shapes")
        rows.append(
            Comparison(
                "QuEST layer, 1 bit", "time of a training step", against, kind,
                f"{geometric([case['hfnoise, 1 bit']['ratio'] for case in cases], '').value:.2f} of nn.Linear",
                f"{geometric([case[way]['ratio'] for case in cases], '').value:.2f} of nn.Linear", ratio,
            )
        )  # fmt: skip
    return rows


def size(found: dict[str, Any]) -> list[Comparison]:
    """Return bits per weight of linear layers, scales included, beside the peer of the same width."""
    bits = {name: one["linear_bits"] for name, one in found["results"].items()}
    return [
        Comparison(
            f"export_packed, {ours}", "bits per weight in the file", against, kind,
            f"{bits[f'hfnoise, {ours}']:.3f}", f"{bits[against]:.3f}",
            Ratio(bits[f"hfnoise, {ours}"] / bits[against], spread="exact"),
            _PACKAGES.get(against.split()[0], ""),
        )
        for ours, against, kind in (
            ("1 bits", "bfloat16", STOCK), ("1.58 bits", "BitNet (transformers)", PEER),
            ("1 bits", "torchao 1 bit", PEER), ("4 bits", "bitsandbytes NF4", PEER),
        )
        if against in bits
    ]  # fmt: skip
