"""A step of `DiffusionTrainer` against the same step in a loop written with accelerate, as diffusers' scripts are.

Both train the UNet of the digits world on the same rows with the same batches, AdamW, gradient clipping, one thread.
The time of a step is the difference between a long and a short run, so that building Trainers does not count; process
time, because other work may be on the machine. The runs of a pair follow each other, and what is reported is the
median over the pairs of the ratio of their samples per second. With the Trainer's options (an average of the weights,
min-SNR weights, offset noise and so on), which the loop has not, it is reported too, and nothing is claimed.

    python -m hfnoise.benchmarks.diffusion_trainer --output_dir docs/results
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.utils.data import DataLoader

from hfnoise import DiffusionTrainer, DiffusionTrainingArguments
from hfnoise.benchmarks import reporting
from hfnoise.folders import output_folder
from hfnoise.trainers.diffusion_rows import DiffusionCollator
from hfnoise.worlds.digits_pipeline import new_digits_pipeline

LOOP, TRAINER, ALL = "accelerate loop", "DiffusionTrainer", "DiffusionTrainer, all options"
# Issue: of the samples a second of the loop.
LEAST_SHARE = 0.95
_ROWS = 512
_EXTRAS: dict[str, Any] = {
    "ema_decay": 0.999, "snr_gamma": 5.0, "noise_offset": 0.05, "input_perturbation": 0.1, "prompt_dropout": 0.1,
}  # fmt: skip


def make_rows() -> datasets.Dataset:
    """Return rows of random latents and prompt states, of the shapes of the digits world."""
    generator = torch.Generator().manual_seed(0)
    latents, states = (torch.randn(_ROWS, *shape, generator=generator) for shape in ((4, 8, 8), (8, 64)))
    return datasets.Dataset.from_dict(
        {"latents": latents.numpy(), "encoder_hidden_states": states.numpy()},
        features=datasets.Features(
            {
                "latents": datasets.Array3D((4, 8, 8), "float32"),
                "encoder_hidden_states": datasets.Array2D((8, 64), "float32"),
            }
        ),
    ).with_format("torch")


def train_by_hand(width: int, rows: datasets.Dataset, batch_size: int, steps: int) -> float:
    """Return the process time of a loop like that of diffusers' train_text_to_image.py, in seconds."""
    pipe = new_digits_pipeline(width)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    accelerator = Accelerator(cpu=True)
    unet = pipe.unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2, fused=True)
    loader: Any = DataLoader(rows, batch_size, shuffle=True, collate_fn=DiffusionCollator(), drop_last=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    started, done = time.process_time(), 0
    while done < steps:
        for batch in loader:
            latents = batch["latents"]
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),)).long()
            noisy = scheduler.add_noise(latents, noise, timesteps)
            prediction = unet(noisy, timesteps, batch["encoder_hidden_states"], return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
            accelerator.gather(loss.repeat(len(latents))).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
    return time.process_time() - started


def train_with_trainer(width: int, rows: datasets.Dataset, batch_size: int, steps: int, **settings: Any) -> float:
    """Return the process time of `train()` in seconds."""
    pipe = new_digits_pipeline(width)
    with tempfile.TemporaryDirectory() as folder:
        arguments = DiffusionTrainingArguments(
            folder, use_cpu=True, bf16=False, max_steps=steps, report_to="none", learning_rate=1e-4,
            lr_scheduler_type="constant", per_device_train_batch_size=batch_size, save_strategy="no",
            logging_steps=1000, disable_tqdm=True, dataloader_drop_last=True, optim="adamw_torch_fused",
            weight_decay=1e-2, **settings,
        )  # fmt: skip
        empty = {"encoder_hidden_states": torch.zeros(1, 8, 64)} if arguments.prompt_dropout else None
        trainer = DiffusionTrainer(
            pipe.unet, arguments, scheduler=pipe.scheduler, train_dataset=rows, empty_prompt=empty
        )
        started = time.process_time()
        trainer.train()
        return time.process_time() - started


def measure(kinds: dict[str, Callable[[int], float]], steps: tuple[int, int], pairs: int) -> dict[str, list[float]]:
    """Return the seconds of a step of each kind, once for each pair.

    Args:
        kinds (`dict[str, Callable[[int], float]]`): name -> function of the number of steps that returns seconds.
        steps (`tuple[int, int]`): of the short and of the long run.
        pairs (`int`): how often all kinds are run, one after the other; every second time in the opposite order.
    """
    short, long = steps
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for run in kinds.values():
        run(1)  # imports, and what is computed once for a process
    for pair in range(pairs):
        for name in list(kinds) if pair % 2 == 0 else reversed(list(kinds)):
            found[name].append((kinds[name](long) - kinds[name](short)) / (long - short))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; exit code 1 if the Trainer is slower than claimed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    parser.add_argument("--pairs", type=int, default=5, help="how often each kind is run")
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 14), help="of the short and the long run")
    parser.add_argument("--width", type=int, default=24, help="of the UNet, see new_digits_pipeline")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of a step")
    given = parser.parse_args(arguments)
    folder: Path = output_folder(given.output_dir)
    torch.set_num_threads(1)
    rows = make_rows()
    setting = (given.width, rows, given.batch_size)
    kinds: dict[str, Callable[[int], float]] = {
        LOOP: lambda steps: train_by_hand(*setting, steps),
        TRAINER: lambda steps: train_with_trainer(*setting, steps),
        ALL: lambda steps: train_with_trainer(*setting, steps, **_EXTRAS),
    }
    times = measure(kinds, tuple(given.steps), given.pairs)
    header = ["", "samples a second", "by the loop", "spread"]
    table, shares = [], {}
    for name, found in times.items():
        ratios = [theirs / ours for theirs, ours in zip(times[LOOP], found, strict=True)]
        shares[name] = statistics.median(ratios)
        rate = given.batch_size / statistics.median(found)
        table.append([name, f"{rate:.0f}", f"{shares[name]:.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}"])
    reporting.print_table(f"digits UNet of width {given.width}, {given.batch_size} rows a step", header, table)
    share = shares[TRAINER]
    check = (f"samples a second of {TRAINER} / {LOOP}: {share:.3f} >= {LEAST_SHARE}", share >= LEAST_SHARE)
    judged = reporting.judge([check])
    content = {
        "seconds": times, "batch_size": given.batch_size, "width": given.width, "steps": list(given.steps),
        "acceptance": [list(check)],
    }  # fmt: skip
    reporting.write_json(folder / "diffusion_trainer.json", {**reporting.circumstances([0]), **content})
    text = "\n".join([reporting.markdown(header, table), judged])
    (folder / "diffusion_trainer.md").write_text(text, encoding="utf-8")
    return int(not check[1])


if __name__ == "__main__":
    raise SystemExit(main())
