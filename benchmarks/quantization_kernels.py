"""Products of quantised layers on a CPU: bit planes and int8 of hfnoise, and what else PyTorch users have.

`python -m hfnoise.benchmarks.quantization_kernels` prints tables and writes quantization_kernels.json, .md and .png.
Two cases: one token through a weight of 4096 x 4096 (generation), 256 tokens through 2048 x 2048 (reading a prompt).
"Product" is from operands that are ready; "layer" is from float32 inputs to float32 outputs, quantisation included.

Times are wall times: the minimum of many samples, the ways taking turns, because a machine may be shared. A sample is
the fastest of a few calls in a row, so that weights are in the caches as far as they fit: the 2 MiB of 4096 x 4096 at
1 bit stay in an L2 cache for the product; in the layer, as in a model, other operations push them out in between.
A product that took longer than its layer shows how much the machine was disturbed.

Every output of ours is compared with the exact float product first, bit by bit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hfnoise.benchmarks.reporting import circumstances, markdown, print_table, write_json
from hfnoise.errors import UsageError
from hfnoise.folders import output_folder
from hfnoise.quantization.grids import grid_for
from hfnoise.quantization.kernels import integer_product, kernel_linear, prepare_weight, status
from hfnoise.quantization.linear_function import exact_product
from hfnoise.quantization.packing import pack
from hfnoise.quantization.row_quantizer import row_quantizer
from hfnoise.quantization.rows import quantized_rows, scaled_sums

CASES = {"1 token, 4096 x 4096": (1, 4096, 4096), "256 tokens, 2048 x 2048": (256, 2048, 2048)}
FLOAT32, OURS = "float32", "hfnoise"
# Of the issue: how many times faster than float32, and than the fastest of the other libraries, 1 bit is at one token.
CLAIMS = {FLOAT32: 20.0, "best library": 5.0}
_SAMPLE_SECONDS = 5e-3
_GROUP = 128  # of int4 weights
Call = Callable[[], Tensor]


def ours(x: Tensor, weight: Tensor, bits: int) -> tuple[Call, Call]:
    """Return the product and the layer with weights and inputs of `bits`."""
    levels, length = grid_for(bits).levels, weight.shape[1]
    encoded, settings = quantized_rows(weight, row_quantizer(weight, bits)), row_quantizer(x, bits)
    inputs = quantized_rows(x, settings)
    assert encoded.codes is not None and inputs.codes is not None  # both by default
    assert encoded.points is not None and inputs.points is not None
    prepared, codes = prepare_weight(pack(encoded.codes, bits), bits, bits, length), inputs.codes

    def product() -> Tensor:
        return integer_product(codes, prepared, bits, bits)

    def layer() -> Tensor:
        return kernel_linear(x, settings, prepared, encoded.step)

    floats = exact_product(inputs.points, encoded.points, (levels, levels), x.dtype)
    if not torch.equal(layer(), scaled_sums(floats, inputs.step, encoded.step, None)):
        raise RuntimeError(f"{bits} bits: the kernel's output is not that of the float product.")
    return product, layer


def float_products(x: Tensor, weight: Tensor) -> dict[str, tuple[Call, Call]]:
    """Return nn.Linear in two dtypes."""
    half_x, half_weight = x.bfloat16(), weight.bfloat16()
    return {
        FLOAT32: (lambda: functional.linear(x, weight),) * 2,
        "bfloat16": (
            lambda: functional.linear(half_x, half_weight),
            lambda: functional.linear(x.bfloat16(), half_weight).float(),
        ),
    }


def aten_products(x: Tensor, weight: Tensor) -> dict[str, tuple[Call, Call]]:
    """Return what PyTorch itself has for integer weights."""
    half_x = x.bfloat16()
    scale = weight.abs().amax(1, keepdim=True) / 127
    int8 = (weight / scale).round().to(torch.int8)
    half_scale = scale.flatten().bfloat16()

    def int8_inputs() -> tuple[Tensor, Tensor]:
        step = x.abs().amax(1, keepdim=True) / 127
        return (x / step).round_().to(torch.int8), step

    def dynamic() -> Tensor:
        codes, step = int8_inputs()
        return torch._int_mm(codes, int8.T).float().mul_(step).mul_(scale.T)

    codes, _ = int8_inputs()
    int4 = torch._convert_weight_to_int4pack_for_cpu((int8 // 16 + 8).int(), 2)
    groups = torch.ones(weight.shape[1] // _GROUP, len(weight), 2, dtype=torch.bfloat16)
    return {
        "aten int8 weights": (
            lambda: torch._weight_int8pack_mm(half_x, int8, half_scale),
            lambda: torch._weight_int8pack_mm(x.bfloat16(), int8, half_scale).float(),
        ),
        "aten int4 weights": (
            lambda: torch._weight_int4pack_mm_for_cpu(half_x, int4, _GROUP, groups),
            lambda: torch._weight_int4pack_mm_for_cpu(x.bfloat16(), int4, _GROUP, groups).float(),
        ),
        "torch._int_mm (W8A8)": (lambda: torch._int_mm(codes, int8.T), dynamic),
    }


def other_libraries(x: Tensor, weight: Tensor) -> dict[str, tuple[Call, Call]]:
    """Return the layers of libraries that are installed; their products cannot be had apart."""
    found: dict[str, tuple[Call, Call]] = {}
    try:
        import bitsandbytes
    except ImportError:
        pass
    else:
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        found["bitsandbytes NF4"] = (lambda: bitsandbytes.matmul_4bit(x, packed.t(), state),) * 2  # type: ignore[attr-defined]
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, quantize_
    except ImportError:
        return found
    for name, config in {
        "torchao W8A8": Int8DynamicActivationInt8WeightConfig(),
        "torchao 1-bit weights": IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int1")),  # noqa: B009  (not in its stubs)
    }.items():
        layer = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], len(weight), bias=False))
        layer[0].weight.data = weight.clone()
        quantize_(layer, config)
        found[name] = (partial(layer, x),) * 2
    return found


def measure(calls: dict[str, tuple[Call, Call]], repeats: int) -> dict[str, dict[str, float]]:
    """Return the fastest product and layer of every way, in seconds."""
    one_after_the_other = [(name, part, pair[part == "layer"]) for name, pair in calls.items() for part in PARTS]
    best = {name: dict.fromkeys(PARTS, float("inf")) for name in calls}
    for name, part, call in one_after_the_other:  # a warm-up, and how many calls a sample may have
        best[name][part] = min(_seconds(call) for _ in range(2))
    for _ in range(repeats):
        for name, part, call in one_after_the_other:
            for _ in range(max(1, min(20, int(_SAMPLE_SECONDS / best[name][part])))):
                best[name][part] = min(best[name][part], _seconds(call))
    for name, (product, layer) in calls.items():
        if product is layer:  # measured twice: the difference is what else the machine did, and no merit of ours
            best[name] = dict.fromkeys(PARTS, min(best[name].values()))
    return best


PARTS = ("product", "layer")


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run_case(case: tuple[int, int, int], repeats: int) -> dict[str, dict[str, float]]:
    """Return the times of every way for random operands."""
    tokens, length, rows = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, length, generator=generator)
    weight = torch.randn(rows, length, generator=generator) / length**0.5
    calls = {**float_products(x, weight), **aten_products(x, weight), **other_libraries(x, weight)}
    calls |= {f"{OURS} W{bits}A{bits}": ours(x, weight, bits) for bits in (1, 2, 4)}
    with torch.inference_mode():
        return measure(calls, repeats)


def speed_ups(times: dict[str, dict[str, float]], part: str) -> dict[str, float]:
    """Return how many times faster 1 bit is than float32, and than the fastest that is neither ours nor float32."""
    libraries = [value[part] for name, value in times.items() if not name.startswith((OURS, FLOAT32))]
    one_bit = times[f"{OURS} W1A1"][part]
    return {FLOAT32: times[FLOAT32][part] / one_bit, "best library": min(libraries) / one_bit}


def _plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    rows = -(-len(results) // 2)
    figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, min(2, len(results)), squeeze=False).flat
    for axis, (title, times) in zip(panels, results.items(), strict=False):
        for shift, part in enumerate(PARTS):
            places = [place + 0.4 * shift for place in range(len(times))]
            axis.barh(places, [1e3 * value[part] for value in times.values()], 0.4, label=part)
        axis.set_yticks([place + 0.2 for place in range(len(times))], list(times), fontsize=8)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("milliseconds, fastest of many")
        axis.set_title(title, fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; return 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30, help="rounds in which every way takes its turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to measure with")
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help="by default both"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark_results"), help="folder of the results")
    given = parser.parse_args(arguments)
    given.output_dir = output_folder(given.output_dir)
    if given.repeats < 1 or min(given.threads) < 1:
        raise UsageError("--repeats and --threads must be at least 1.")
    header = ["way", "product", "layer", "float32 / product", "float32 / layer"]
    results: dict[str, Any] = {}
    tables, claims = [f"Kernels: {status().level or 'torch'}\n"], {}
    threads_before = torch.get_num_threads()
    for threads in given.threads:
        torch.set_num_threads(threads)
        for case in given.cases:
            title = f"{case}, {threads} thread{'s' * (threads > 1)}"
            times = results[title] = run_case(CASES[case], given.repeats)
            base = times[FLOAT32]
            rows = [
                [name, *(f"{1e3 * found[part]:.3f} ms" for part in PARTS)]
                + [f"{base[part] / found[part]:.1f}" for part in PARTS]
                for name, found in times.items()
            ]
            print_table(title, header, rows)
            tables.append(f"{title}\n\n{markdown(header, rows)}")
            if CASES[case][0] == 1:
                claims[title] = {part: speed_ups(times, part) for part in PARTS}
    torch.set_num_threads(threads_before)
    held = all(found["product"][rival] >= least for found in claims.values() for rival, least in CLAIMS.items())
    for title, found in claims.items():
        for part in PARTS:
            line = ", ".join(f"{ratio:.1f} times as fast as {rival}" for rival, ratio in found[part].items())
            tables.append(f"1 bit, {part}, {title}: {line}\n")
            print(tables[-1], end="")
    print(f"Claimed of the product at one token: {CLAIMS}: {'holds' if held else 'DOES NOT HOLD'}")
    settings = {name: value for name, value in vars(given).items() if name != "output_dir"}
    report = {"settings": settings, "results": results, "speed_ups": claims, "claims": CLAIMS, "claims_hold": held}
    report["peers"] = {name: version(name) for name in ("bitsandbytes", "torchao") if find_spec(name) is not None}
    report["kernels"] = {"level": status().level, "compiled": status().compiled}
    write_json(given.output_dir / "quantization_kernels.json", {**circumstances([0]), **report})
    (given.output_dir / "quantization_kernels.md").write_text("\n".join(tables), encoding="utf-8")
    _plot(results, given.output_dir / "quantization_kernels.png")
    return int(not held)


if __name__ == "__main__":
    raise SystemExit(main())
