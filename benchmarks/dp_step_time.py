"""What per-unit gradients cost: a clipped step against the ordinary LoRA step, and Opacus, measured in one run."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfnoise.benchmarks import reporting
from hfnoise.privacy import UnitGradientRecorder, clip_per_unit

_WARM_UP = 3  # the first steps allocate
_VOCABULARY = 1024
_CLIP_NORM = 1.0
_RANK = 8
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """A model, its adapted layers, and the shape of a micro-batch."""

    name: str
    architecture: str
    targets: tuple[str, ...]
    rows: int
    length: int


CASES = (
    Case("Llama q,v B8 T128", "llama", ("q_proj", "v_proj"), 8, 128),
    Case("Llama q,v B4 T512", "llama", ("q_proj", "v_proj"), 4, 512),
    Case("Llama all-linear B8 T128", "llama", ALL_LINEAR, 8, 128),
    Case("Llama all-linear B2 T1024", "llama", ALL_LINEAR, 2, 1024),
    Case("Llama q,v B32 T32", "llama", ("q_proj", "v_proj"), 32, 32),
    Case("BERT q,v B8 T128", "bert", ("query", "value"), 8, 128),
)


def build(case: Case) -> nn.Module:
    """Return the model of a case: hidden size 256, 4 layers, LoRA of rank 8 of which only B trains."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": _VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    base: Any
    if case.architecture == "llama":
        base = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=688))
    else:
        base = BertForSequenceClassification(
            BertConfig(**sizes, intermediate_size=1024, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )
    model = get_peft_model(base, LoraConfig(r=_RANK, target_modules=list(case.targets)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # at 0 no gradient would flow through the adapter
    return model.train()


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the loss of each row: mean cross-entropy of its tokens, or of its label."""
    logits = model(input_ids=tokens).logits
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, tokens[:, 0] % logits.shape[1], reduction="none")
    entropy = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return entropy.view(len(tokens), -1).mean(1)


def ordinary_step(model: nn.Module) -> Callable[[Tensor], None]:
    """Return the non-private step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(tokens: Tensor) -> None:
        losses(model, tokens).mean().backward()
        for parameter in trainable:
            parameter.grad = None

    return step


def recorded_step(model: nn.Module, rows: int) -> Callable[[Tensor], None]:
    """Return the step with per-unit gradients and flat clipping."""
    recorder = UnitGradientRecorder(model, rows)
    unit, weight = torch.arange(rows), torch.ones(rows)

    def step(tokens: Tensor) -> None:
        with recorder.record(unit, weight):
            losses(model, tokens).sum().backward()
        clip_per_unit(recorder.collect(), _CLIP_NORM)
        recorder.reset()

    return step


def hooks_step(model: nn.Module, rows: int) -> Callable[[Tensor], None]:
    """Return the step with the hooks of Opacus, clipped by its optimizer."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    wrapped = GradSampleModule(model, strict=False, loss_reduction="sum")
    trainable = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.SGD(trainable, lr=0.0), noise_multiplier=0.0, max_grad_norm=_CLIP_NORM, expected_batch_size=rows
    )

    def step(tokens: Tensor) -> None:
        losses(wrapped, tokens).sum().backward()
        optimizer.clip_and_accumulate()
        optimizer.zero_grad()

    return step


def ghost_step(model: nn.Module, rows: int) -> Callable[[Tensor], None]:
    """Return the step with ghost clipping of Opacus: norms from a first backward, the clipped sum from a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, strict=False, loss_reduction="sum", max_grad_norm=_CLIP_NORM, use_ghost_clipping=True
    )

    def step(tokens: Tensor) -> None:
        found = losses(wrapped, tokens)
        found.sum().backward(retain_graph=True)
        wrapped.zero_grad()
        factors = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        (factors * found).sum().backward()
        wrapped.enable_hooks()
        wrapped.zero_grad()

    return step


ORDINARY, AGAIN, OURS = "ordinary", "ordinary, again", "hfnoise"


def steps_of(case: Case) -> dict[str, Callable[[Tensor], None]]:
    """Return the steps that are compared, each with its own model of the same weights."""
    steps = {
        ORDINARY: ordinary_step(build(case)),
        AGAIN: ordinary_step(build(case)),  # shows the resolution
        OURS: recorded_step(build(case), case.rows),
    }
    if find_spec("opacus") is not None:
        steps["Opacus hooks"] = hooks_step(build(case), case.rows)
        steps["Opacus ghost"] = ghost_step(build(case), case.rows)
    return steps


@dataclass(frozen=True)
class Cost:
    """What a step costs, as a ratio to the ordinary step.

    Args:
        time (`float`): median of process time over that of the ordinary step on the same micro-batch.
        memory (`float`): peak of what the step allocates (weights, equal in all, would hide differences).
        milliseconds (`float`): median process time.
    """

    time: float
    memory: float
    milliseconds: float


def measure(case: Case, repeats: int) -> dict[str, Cost]:
    """Return the cost of every step; they take turns in an order that rotates, as the machine's speed varies."""
    steps = steps_of(case)
    names = list(steps)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(_WARM_UP + repeats):
        tokens = torch.randint(_VOCABULARY, (case.rows, case.length), generator=generator)
        for turn in range(len(names)):
            name = names[(repeat + turn) % len(names)]
            start = time.process_time()
            steps[name](tokens)
            if repeat >= _WARM_UP:
                seconds[name].append(time.process_time() - start)
    peaks = {name: _peak_memory(step, tokens) for name, step in steps.items()}
    return {
        name: Cost(
            statistics.median(own / base for own, base in zip(seconds[name], seconds[ORDINARY], strict=True)),
            peaks[name] / peaks[ORDINARY],
            1000 * statistics.median(seconds[name]),
        )
        for name in names
    }


def _peak_memory(step: Callable[[Tensor], None], tokens: Tensor) -> int:
    """Return the peak of what a step allocates, in bytes, as the allocator reports it: weights are not among it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(tokens)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of ratios."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def _plot(costs: dict[str, dict[str, Cost]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = [name for name in next(iter(costs.values())) if name not in (ORDINARY, AGAIN)]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        positions = [place + width * number for place in range(len(costs))]
        axes.bar(positions, [cost[name].time for cost in costs.values()], width, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(costs))], list(costs), fontsize=8)
    axes.set_ylabel("time of a clipped step / ordinary LoRA step")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of each kind and case")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="numbers of the cases to run")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    costs = {CASES[number].name: measure(CASES[number], given.repeats) for number in given.cases}
    names = list(next(iter(costs.values())))
    header = ["step time, peak memory / ordinary", *names[1:]]
    rows = [
        [case, *(f"{cost[name].time:.3f}, {cost[name].memory:.3f}" for name in names[1:])]
        for case, cost in costs.items()
    ]
    means = {name: geometric_mean([cost[name].time for cost in costs.values()]) for name in names}
    worst = {name: max(cost[name].time for cost in costs.values()) for name in names}
    rows += [["geometric mean of time", *(f"{means[name]:.3f}" for name in names[1:])]]
    rows += [["worst time", *(f"{worst[name]:.3f}" for name in names[1:])]]
    reporting.print_table("a clipped step against the ordinary LoRA step, one thread", header, rows)
    folder = Path(given.output_dir)
    results = {case: {name: asdict(value) for name, value in cost.items()} for case, cost in costs.items()}
    content = {"results": results, "geometric_mean": means, "worst": worst, "repeats": given.repeats}
    reporting.write_json(folder / "dp_step_time.json", {**reporting.circumstances([0]), **content})
    (folder / "dp_step_time.md").write_text(reporting.markdown(header, rows), encoding="utf-8")
    _plot(costs, folder / "dp_step_time.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
