"""Prefix sharing: four completions of a prompt as a tree row, against padding and against packing.

`python -m hfnoise.benchmarks.prefix_sharing` prints a table and writes prefix_sharing.json and .md. Token ids and
weights are random: only shapes matter. The four completions are those of BVPO: two answers with a reasoning trace, two
without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from hfnoise.benchmarks.reporting import circumstances, markdown, print_table, write_json
from hfnoise.errors import UsageError
from hfnoise.folders import output_folder
from hfnoise.preference.tree_rows import IGNORED
from hfnoise.trainers.prefix_sharing import TREE_ATTENTION, PrefixSharingForward

# Mean lengths of prompt, answer with trace and answer without: long traces, and long prompts.
PROFILES = {"A: short prompts, long traces": (190, 1030, 190), "B: long prompts, short answers": (760, 370, 100)}
BRANCHES = 4
# Single lengths lie within this share of the mean.
_SPREAD = 0.4
TWO_PASSES = "padded, two passes"
# Linear layers: what attention does is counted by time and memory only.
_LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm)


@dataclass(frozen=True)
class Batch:
    """Padded rows, all first branches, then all second ones: trace and no trace chosen, then rejected."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def rows(self, numbers: Tensor) -> Batch:
        """Return some of the rows, cut to the longest of them."""
        width = int(self.attention_mask[numbers].sum(1).max())
        return Batch(*(tensor[numbers, :width] for tensor in (self.input_ids, self.attention_mask, self.labels)))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that TRL's trainers call a model with."""
        return {**vars(self), "use_cache": False, "fused_lm_head": True}


@dataclass(frozen=True)
class Pass:
    """One forward and backward of a way: the arguments of the model, as they are or for a tree row."""

    arguments: dict[str, Any]
    shares_prefixes: bool = False

    def run(self, model: Any) -> None:
        """Run it; the gradients of several passes add up."""
        forward = PrefixSharingForward(model, BRANCHES) if self.shares_prefixes else model
        forward(**self.arguments).log_probs.sum().backward()


def make_batch(profile: tuple[int, int, int], prompts: int, vocabulary: int, generator: torch.Generator) -> Batch:
    """Return a micro-batch with random ids and lengths."""

    def length(mean: int) -> int:
        low, high = round(mean * (1 - _SPREAD)), round(mean * (1 + _SPREAD))
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def ids(count: int) -> Tensor:
        return torch.randint(1, vocabulary, (count,), generator=generator)

    prompt_mean, trace, answer = profile
    texts = [ids(length(prompt_mean)) for _ in range(prompts)]
    # t+, e+, t-, e-
    branches = [[ids(length(mean)) for _ in range(prompts)] for mean in (trace, answer, trace, answer)]
    rows = [(text, own) for branch in branches for text, own in zip(texts, branch, strict=True)]
    width = max(len(text) + len(own) for text, own in rows)
    padded, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, IGNORED))
    for number, (text, own) in enumerate(rows):
        end = len(text) + len(own)
        padded[number, :end], mask[number, :end] = torch.cat([text, own]), 1
        labels[number, len(text) : end] = own
    return Batch(padded, mask, labels)


def build_model(hidden: int, layers: int, vocabulary: int) -> Any:
    """Return a Llama of that size with TRL's fused head, on tree attention (`sdpa` for padded and packed rows)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(TREE_ATTENTION)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))  # as DPOTrainer does
    return model


def two_padded_passes(batch: Batch) -> list[Pass]:
    """Return the rows with traces and those without, each padded to its own longest row."""
    chosen_trace, chosen, rejected_trace, rejected = torch.arange(len(batch.input_ids)).chunk(BRANCHES)
    halves = [torch.cat([chosen_trace, rejected_trace]), torch.cat([chosen, rejected])]
    return [Pass(batch.rows(half).arguments()) for half in halves]


def one_padded_pass(batch: Batch) -> list[Pass]:
    """Return all four branches padded to the longest row, as TRL's collator would lay them out."""
    return [Pass(batch.arguments())]


def packed_pass(batch: Batch) -> list[Pass]:
    """Return all rows behind each other, without padding and without sharing; transformers makes the mask."""
    real = batch.attention_mask.bool()
    labels = torch.cat([batch.labels[:, 1:], torch.full_like(batch.labels[:, :1], IGNORED)], 1)
    positions = batch.attention_mask.cumsum(1) - 1
    rows = {"input_ids": batch.input_ids, "position_ids": positions, "shift_labels": labels}
    flat = {name: values[real][None] for name, values in rows.items()}
    return [Pass({**flat, "use_cache": False, "fused_lm_head": True})]


def tree_pass(batch: Batch) -> list[Pass]:
    """Return the padded rows for prefix sharing, which makes the tree row inside the timed part."""
    return [Pass(batch.arguments(), shares_prefixes=True)]


WAYS: dict[str, Callable[[Batch], list[Pass]]] = {
    TWO_PASSES: two_padded_passes,
    "padded, one pass": one_padded_pass,
    "packed": packed_pass,
    "tree": tree_pass,
}


@dataclass(frozen=True)
class Cost:
    """Forward and backward of a micro-batch.

    Args:
        tokens (`int`): that the layers see in all batches, padding included.
        linear_flops (`float`): of matrix products with weights, the head included, in all batches.
        seconds (`float`): median over batches and repetitions.
        time_ratio (`float`): median of time / time of two padded passes on the same batch in the same repetition.
        peak_memory (`float`): of all tensors, weights and gradients included, MB.
    """

    tokens: int
    linear_flops: float
    seconds: float
    time_ratio: float
    peak_memory: float


def measure(model: Any, batches: list[Batch], repeats: int) -> dict[str, Cost]:
    """Return the cost of every way to run the batches; they take turns, in an order that rotates."""
    names = list(WAYS)
    times: dict[str, list[float]] = {name: [] for name in names}
    counts: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for batch in batches:
        passes = {name: way(batch) for name, way in WAYS.items()}
        for name in names:  # also the warm-up
            counts[name].append(_count(model, passes[name]))
            peaks[name].append(_peak_memory(model, passes[name]))
        for turn in range(repeats):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                model.zero_grad(set_to_none=True)
                start = time.perf_counter()
                for one in passes[name]:
                    one.run(model)
                times[name].append(time.perf_counter() - start)
    return {
        name: Cost(
            tokens=sum(tokens for tokens, _ in counts[name]),
            linear_flops=sum(flops for _, flops in counts[name]),
            seconds=statistics.median(times[name]),
            time_ratio=statistics.median(own / base for own, base in zip(times[name], times[TWO_PASSES], strict=True)),
            peak_memory=max(peaks[name]),
        )
        for name in names
    }


def _count(model: Any, passes: list[Pass]) -> tuple[int, float]:
    """Return the tokens and the FLOPs of the linear layers."""
    tokens = 0

    def hook(module: Any, arguments: Any, output: Tensor) -> None:
        nonlocal tokens
        tokens += output.shape[0] * output.shape[1]

    handle = model.get_input_embeddings().register_forward_hook(hook)
    with FlopCounterMode(display=False) as counter:
        for one in passes:
            one.run(model)
    handle.remove()
    flops = counter.get_flop_counts()["Global"]
    return tokens, float(sum(flops.get(operation, 0) for operation in _LINEAR))


def _peak_memory(model: Any, passes: list[Pass]) -> float:
    """Return the peak of all tensors, in MB."""
    model.zero_grad(set_to_none=True)
    peaks = []
    for one in passes:
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            one.run(model)
        (device,) = tracker.get_tracker_snapshot("peak").values()
        peaks.append(float(device["Total"]) / 2**20)
    return max(peaks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=1, help="batches of other lengths, seeds 0, 1, ...")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions of every way, in turn")
    parser.add_argument("--prompts", type=int, default=2, help="prompts in a micro-batch, with 4 branches each")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--vocabulary", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("benchmark_results"), help="folder of JSON and Markdown"
    )
    given = parser.parse_args(arguments)
    given.output_dir = output_folder(given.output_dir)
    if given.batches < 1 or given.repeats < 1:
        raise UsageError("--batches and --repeats must be at least 1.")
    model = build_model(given.hidden, given.layers, given.vocabulary)
    header = ["way", "tokens", "linear FLOPs", "time", "peak memory", "seconds"]
    results, tables = {}, []
    for title, profile in PROFILES.items():
        batches = [
            make_batch(profile, given.prompts, given.vocabulary, torch.Generator().manual_seed(seed))
            for seed in range(given.batches)
        ]
        costs = measure(model, batches, given.repeats)
        rows = [_row(name, cost, costs[TWO_PASSES]) for name, cost in costs.items()]
        print_table(f"{title} (ratios to two padded passes)", header, rows)
        results[title] = {name: asdict(cost) for name, cost in costs.items()}
        tables.append(f"{title}\n\n{markdown(header, rows)}")
    settings = {name: value for name, value in vars(given).items() if name != "output_dir"}
    report = {**circumstances(range(given.batches)), "threads": torch.get_num_threads(), "settings": settings}
    write_json(given.output_dir / "prefix_sharing.json", {**report, "results": results})
    (given.output_dir / "prefix_sharing.md").write_text("\n".join(tables), encoding="utf-8")
    return 0


def _row(name: str, cost: Cost, base: Cost) -> list[str]:
    return [
        name,
        f"{cost.tokens} ({cost.tokens / base.tokens:.2f})",
        f"{cost.linear_flops / base.linear_flops:.2f}",
        f"{cost.time_ratio:.2f}",
        f"{cost.peak_memory / base.peak_memory:.2f}",
        f"{cost.seconds:.2f}",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
