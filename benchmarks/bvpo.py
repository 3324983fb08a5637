"""BVPO on the arithmetic world: whole runs at equal steps, and the gradient against one of many traces.

`python -m hfnoise.benchmarks.bvpo` prints tables and writes bvpo.json and bvpo.md. The union, a share of 0.5, is what
trl.DPOTrainer does on both kinds of answers together, to the bit (tests/trainers/test_bvpo.py).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from hfnoise.benchmarks.reporting import circumstances, markdown, mean_and_error, print_table, show, write_json
from hfnoise.preference import optimal_trace_alpha
from hfnoise.preference.trace_alpha import closed_form_alpha
from hfnoise.worlds import arithmetic

# Name in tables -> trace_alpha.
SHARES: dict[str, float | str] = {
    "traces only (1)": 1.0,
    "no traces only (0)": 0.0,
    "union = DPO on both (0.5)": 0.5,
    "0.25": 0.25,
    "0.75": 0.75,
    "auto": "auto",
}
MODES = ("think", "nothink")
# Of the gradient part: traces sampled for every prompt, and rows of a batch.
_TRACES, _BATCH = 16, 32


def build(share: float | str, seed: int, pairs: Any, **changes: Any) -> Any:
    """Return a trainer by the recipe of the world."""
    from hfnoise import BVPOConfig, BVPOTrainer

    recipe = arithmetic.TRACE_RECIPE
    arguments = {
        "output_dir": tempfile.mkdtemp(), "seed": seed, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "bf16": False, "activation_checkpointing": False, "precompute_ref_log_probs": True, "beta": recipe.beta,
        "learning_rate": recipe.learning_rate, "num_train_epochs": recipe.num_train_epochs, "logging_steps": 1,
        "max_length": recipe.max_length, "per_device_train_batch_size": recipe.per_device_train_batch_size,
        "trace_alpha": share, "disable_tqdm": True, "prefix_sharing": True,
    }  # fmt: skip
    trainer = BVPOTrainer(
        arithmetic.model_path(),
        args=BVPOConfig(**arguments | changes),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(arithmetic.model_path()),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def accuracies(model: Any) -> dict[str, float]:
    """Return the share of held-out sums answered rightly, by mode, sampled at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(arithmetic.model_path())
    questions = arithmetic.prompts("validation", arithmetic.TRACE_RECIPE.eval_questions)
    return {mode: arithmetic.accuracy(model, tokenizer, questions, mode) for mode in MODES}


def whole_runs(seeds: int, shares: Sequence[str], size: int) -> dict[str, dict[str, list[float]]]:
    """Return accuracies by mode, and the last share, of every method: the same pairs and steps for all of a seed."""
    before = accuracies(AutoModelForCausalLM.from_pretrained(arithmetic.model_path()))
    found: dict[str, dict[str, list[float]]] = {"before": {mode: [before[mode]] for mode in MODES}}
    bar = tqdm(total=seeds * len(shares), desc="runs")
    for seed in range(seeds):
        pairs = arithmetic.trace_pairs("train", size, seed)
        for name in shares:
            trainer = build(SHARES[name], seed, pairs)
            trainer.train()
            result = {**accuracies(trainer.model), "share": trainer.trace_alpha}
            for key, value in result.items():
                found.setdefault(name, {}).setdefault(key, []).append(value)
            bar.update()
    return found


def gradient_errors(prompts: int) -> dict[str, Any]:
    """Return the mean squared error of the gradient of a batch of one trace per prompt, for every share.

    The target is the gradient with traces averaged over 16 samples of every prompt. All parameters count.
    """
    from hfnoise import make_trace_pairs

    questions = arithmetic.trace_pairs("train", prompts)["prompt"]
    draws = [
        make_trace_pairs(arithmetic.model_path(), questions, arithmetic.reward, seed=seed, batch_size=512,
                         max_new_tokens=arithmetic.MAX_NEW_TOKENS)
        for seed in tqdm(range(_TRACES), desc="traces")
    ]  # fmt: skip
    from datasets import concatenate_datasets

    pool = concatenate_datasets(draws).shuffle(seed=0)
    pool = pool.select(range(len(pool) // _BATCH * _BATCH))
    # A learning rate of 0: the share is estimated where the gradients are measured.
    trainer = build("auto", 0, pool, learning_rate=0.0, num_train_epochs=1, alpha_every=1, alpha_decay=0.98)
    trainer.train()
    trace, empty = _batch_gradients(trainer)
    target = trace.mean(0)
    shares = [step / 20 for step in range(21)]
    auto = trainer.trace_alpha
    best = _optimum(trace, empty)
    last = _last_layer(trainer.model)
    errors = {
        f"{share:.3f}": ((share * trace + (1 - share) * empty - target).square().sum(1)).mean().item()
        for share in sorted({*shares, auto, best})
    }
    return {
        "errors": errors,
        "auto": auto,
        "optimum": best,
        "optimum_of_last_layer": _optimum(trace[:, last], empty[:, last]),
        "batches": len(trace),
        "rows": len(pool),
    }


def _optimum(trace: Tensor, empty: Tensor) -> float:
    """Return the share of least squared error for one batch, by the moments over batches."""
    return closed_form_alpha(*optimal_trace_alpha(trace, empty)[1:], count=1)


def _last_layer(model: Any) -> Tensor:
    """Return which entries of a gradient belong to the last decoder layer."""
    name = f"layers.{model.config.num_hidden_layers - 1}."
    parts = [torch.full((parameter.numel(),), name in key) for key, parameter in model.named_parameters()]
    return torch.cat(parts)


def _batch_gradients(trainer: Any) -> tuple[Tensor, Tensor]:
    """Return the full gradients of the loss with traces and without, one row per batch of the pool."""
    model = trainer.model
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for batch in tqdm(trainer.get_train_dataloader(), desc="gradients"):
        losses = _losses(trainer, batch)
        for half, rows in zip(found, losses.chunk(2), strict=True):
            gradients = torch.autograd.grad(rows.mean(), parameters, retain_graph=True)
            half.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(found[0]), torch.stack(found[1])


def _losses(trainer: Any, batch: dict[str, Any]) -> Tensor:
    from hfnoise.trainers.pair_batch import pair_batch

    inputs, _ = trainer.split_columns(trainer._prepare_inputs(batch))
    pairs = pair_batch(trainer._policy_log_probs(inputs), inputs, trainer.beta, {})
    losses: Tensor = trainer.weighted_pair_values([("sigmoid", 1.0)], pairs, pairs.margins)
    return losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=("runs", "gradients"), default=["runs", "gradients"])
    parser.add_argument("--seeds", type=int, default=3, help="whole runs of every share")
    parser.add_argument(
        "--shares", nargs="+", choices=list(SHARES), default=list(SHARES), metavar="SHARE", help="of them; default all"
    )
    parser.add_argument(
        "--pairs", type=int, default=arithmetic.TRACE_RECIPE.train_size, help="training pairs of whole runs"
    )
    parser.add_argument("--prompts", type=int, default=128, help="prompts of the gradient part")
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the model is too small for more
    logging.getLogger("hfnoise").setLevel(logging.WARNING)
    folder = Path(given.output_dir)
    for part in given.parts:
        results, table = _runs(given.seeds, given.shares, given.pairs) if part == "runs" else _gradients(given.prompts)
        seeds = range(given.seeds) if part == "runs" else range(_TRACES)
        write_json(folder / f"bvpo_{part}.json", {**circumstances(seeds), "results": results})
        (folder / f"bvpo_{part}.md").write_text(table, encoding="utf-8")
    return 0


def _runs(seeds: int, shares: Sequence[str], size: int) -> tuple[dict[str, Any], str]:
    found = whole_runs(seeds, shares, size)
    header = ["share of the loss with traces", "accuracy with traces", "accuracy without", "last share"]
    rows = [
        [
            name,
            *(show(mean_and_error(values[mode])) for mode in MODES),
            f"{mean_and_error(values['share'])[0]:.2f}" if "share" in values else "",
        ]
        for name, values in found.items()
    ]
    print_table(f"arithmetic world, {seeds} seeds, per cent of held-out sums", header, rows)
    return found, markdown(header, rows)


def _gradients(prompts: int) -> tuple[dict[str, Any], str]:
    found = gradient_errors(prompts)
    traces_only = found["errors"]["1.000"]
    header = ["share", "mean squared error / that of traces only"]
    named = {f"{found['auto']:.3f}": " (auto)", f"{found['optimum']:.3f}": " (optimum)", "0.500": " (union)"}
    shown = {"0.000", "0.250", "0.500", "0.750", "1.000", *named}
    rows = [
        [share + named.get(share, ""), f"{error / traces_only:.3f}"]
        for share, error in found["errors"].items()
        if share in shown
    ]
    rows.append([f"{found['optimum_of_last_layer']:.3f} (what the last layer alone would take)", ""])
    print_table(f"gradient of {_BATCH} one-trace rows against {_TRACES} traces per prompt", header, rows)
    return found, markdown(header, rows)


if __name__ == "__main__":
    raise SystemExit(main())
