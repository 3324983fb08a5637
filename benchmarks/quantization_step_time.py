"""Training step of one quantised linear layer beside nn.Linear: forward and backward, and what is kept in between.

`python -m hfnoise.benchmarks.quantization_step_time` prints a table and writes quantization_step_time.json and .md.
Beside ours stand the stock layer, a plain spelling of QuEST in autograd with the dense rotation of the official code
(a K x K matrix of H128 blocks) and with a grouped one, and transformers' BitNet layer (`AutoBitLinear`, online;
compiled parts run as written). One thread; CPU time, the minimum of many interleaved steps, since a machine may be
shared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfnoise.benchmarks.reporting import circumstances, judge, markdown, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.quantization import LinearQuantization, QuestLinear, grid_for, hadamard_matrix
from hfnoise.quantization.kernels import status

STOCK = "nn.Linear"
# The bound for a width of 1024.
LIMIT = 1.30


class PlainQuest(nn.Linear):
    """QuEST as its formulas stand: rotate, quantise with a detached rounding error, mask; no code of ours."""

    def __init__(self, width: int, bits: int, dense: bool) -> None:
        super().__init__(width, width, bias=False)
        self.grid, self.dense = grid_for(bits), dense
        block = hadamard_matrix(min(128, width))
        self.rotation = torch.block_diag(*[block] * (width // len(block))) if dense else block

    def quantized(self, x: Tensor) -> Tensor:
        """Return the rows of `x` on the grid."""
        rotated = x @ self.rotation if self.dense else (x.view(-1, len(self.rotation)) @ self.rotation).view(x.shape)
        step = self.grid.step * rotated.detach().square().mean(-1, keepdim=True).sqrt()
        levels = self.grid.levels
        points = (rotated.detach() / step).floor().clamp(-levels / 2, levels / 2 - 1) + 0.5
        trusted = rotated * (rotated.detach().abs() <= self.grid.trusted_steps() * step)
        return trusted + (points * step - trusted).detach()

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output."""
        return functional.linear(self.quantized(input), self.quantized(self.weight))


def layers(width: int, bits: Sequence[int]) -> dict[str, nn.Module]:
    """Return the layers to be compared, by name."""
    from transformers.integrations.bitnet import AutoBitLinear

    made: dict[str, nn.Module] = {STOCK: nn.Linear(width, width, bias=False)}
    for width_bits in bits:
        settings = LinearQuantization(width_bits, width_bits)
        made[f"hfnoise, {width_bits} bit"] = QuestLinear(width, width, bias=False, quantization=settings)
    weights_only = LinearQuantization(2, None)
    made["hfnoise, 2-bit weights only"] = QuestLinear(width, width, bias=False, quantization=weights_only)
    made["QuEST by autograd, grouped rotation, 4 bit"] = PlainQuest(width, 4, dense=False)
    made["QuEST by autograd, dense rotation, 4 bit"] = PlainQuest(width, 4, dense=True)
    made["transformers AutoBitLinear (BitNet)"] = AutoBitLinear(width, width, bias=False, online_quant=True)
    return made


def step_of(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Return one step: forward and backward; gradients of input and weight are made anew."""

    def step() -> None:
        layer(x).backward(gradient)
        x.grad = layer.weight.grad = None

    return step


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes kept from forward to backward, beside input and weight, which live anyway."""
    known = {x.untyped_storage().data_ptr(), layer.weight.untyped_storage().data_ptr()}  # type: ignore[operator]
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)
        del output
    return sum(sizes.values())


def measure(tokens: int, width: int, bits: Sequence[int], repeats: int) -> dict[str, dict[str, float]]:
    """Return CPU seconds of a step, the ratio to the stock layer, and the bytes kept, by name of the layer."""
    torch.manual_seed(0)
    x, gradient = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    made = layers(width, bits)
    steps = {name: step_of(layer, x, gradient) for name, layer in made.items()}
    best = dict.fromkeys(steps, float("inf"))
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if repeat >= 2:  # the first two warm up
                best[name] = min(best[name], time.process_time() - start)
    return {
        name: {"seconds": best[name], "ratio": best[name] / best[STOCK], "kept_bytes": kept_bytes(made[name], x)}
        for name in made
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; return 1 if the bound of the issue is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048], help="multiples of 128")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="rows of the input")
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4], help="of weights and inputs")
    parser.add_argument("--repeats", type=int, default=20, help="steps of each layer")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark_results"), help="folder of the results")
    given = parser.parse_args(arguments)
    given.output_dir = output_folder(given.output_dir)
    torch.set_num_threads(1)
    torch._dynamo.config.disable = True  # BitNet's decorators would compile for a minute
    results: dict[str, Any] = {}
    for width in given.widths:
        for tokens in given.tokens:
            results[f"{tokens} x {width} x {width}"] = measure(tokens, width, given.bits, given.repeats)
    names = list(next(iter(results.values())))
    header = ["layer", *(f"{case}: step" for case in results), "kept, MiB (last case)"]
    last = list(results.values())[-1]
    kept = {name: f"{last[name]['kept_bytes'] / 2**20:.1f}" for name in names}
    rows = [[name, *(f"{found[name]['ratio']:.2f}" for found in results.values()), kept[name]] for name in names]
    print_table("training step, ratio to nn.Linear", header, rows)
    kernels = status()
    folder = given.output_dir
    ours = [
        found[name]["ratio"]
        for case, found in results.items()
        for name in names
        if case.split(" x ")[1] == "1024" and name.startswith("hfnoise")
    ]
    checks = (
        [(f"slowest step of width 1024 {max(ours):.2f} <= {LIMIT} of nn.Linear", max(ours) <= LIMIT)] if ours else []
    )
    judge(checks)
    report = {
        **circumstances([0]), "threads": 1, "kernels": kernels.level or kernels.reason, "results": results,
        "acceptance": [list(check) for check in checks],
    }  # fmt: skip
    write_json(folder / "quantization_step_time.json", report)
    (folder / "quantization_step_time.md").write_text(markdown(header, rows), encoding="utf-8")
    return int(not all(passed for _, passed in checks))


if __name__ == "__main__":
    raise SystemExit(main())
