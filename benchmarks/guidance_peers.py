"""What diffusers itself has for skipped unconditional evaluations, on the same pipeline in the same run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import FasterCacheConfig, apply_faster_cache

from hfnoise.benchmarks.guidance_runs import Drawn, Subject, draw, paired_saving, paired_times
from hfnoise.pipelines import ProjectedGuidance

_STOCK, _CALLBACK, _OURS = "full CFG", "SDCFGCutoffCallback", "ours, stop at the same step"


@dataclass(frozen=True)
class Peers:
    """What was seen of the peers.

    Args:
        guided_steps (`int`): before the cut-off.
        rows_saved (`float`): by the cut-off.
        time_saved (`dict[str, float]`): of one image at a time, against full guidance.
        callback_difference (`float`): largest difference between the latents of the callback and of our cut-off.
        callback_batch, stock_guider, faster_cache (`str`): what happened with two images in a batch, with a stock
            guider given to the pipeline, and with FasterCache enabled on its UNet.
    """

    guided_steps: int
    rows_saved: float
    time_saved: dict[str, float]
    callback_difference: float
    callback_batch: str
    stock_guider: str
    faster_cache: str

    def as_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows."""
        header = ["peer", "rows saved", "time saved", "seen"]
        same = f"largest difference of the latents to ours {self.callback_difference:.1e}"
        callback, ours = (f"{100 * self.time_saved[name]:.0f} %" for name in (_CALLBACK, _OURS))
        saved = f"{100 * self.rows_saved:.0f} %"
        rows = [
            [f"{_CALLBACK}, {self.guided_steps} steps guided", saved, callback, same],
            [_OURS, saved, ours, ""],
            [f"{_CALLBACK}, two images", "", "", self.callback_batch],
            ["stock ClassifierFreeGuidance(stop=0.5) given to the pipeline", "", "", self.stock_guider],
            ["FasterCache on the UNet", "", "", self.faster_cache],
        ]
        return header, rows


def peers(subject: Subject, seed: int, steps: int, scale: float, repeats: int) -> Peers:
    """Return what was seen of the peers, half of the steps guided.

    Args:
        subject ([`~hfnoise.benchmarks.guidance_runs.Subject`]): who draws.
        seed (`int`): of the noise.
        steps (`int`): of the scheduler.
        scale (`float`): of guidance.
        repeats (`int`): turns that are timed.
    """
    guided = steps // 2
    cut_off = ProjectedGuidance(eta=1.0, stop=(guided + 0.5) / steps)  # neutral, but for its end

    def one(**more: Any) -> Drawn:
        return draw(subject, subject.labels(1)[:1], seed, steps, scale, **more)

    # It acts at the end of its step.
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=guided - 1)
    theirs, ours = one(callback_on_step_end=callback), one(guider=cut_off)
    runs: dict[str, Callable[[], Any]] = {
        _STOCK: one, _CALLBACK: partial(one, callback_on_step_end=callback), _OURS: partial(one, guider=cut_off),
    }  # fmt: skip
    seconds = paired_times(runs, 4 * repeats)
    two = {
        "prompt": ["the digit two", "the digit one"], "num_inference_steps": steps, "guidance_scale": scale,
        "latents": subject.noise(2, seed), "output_type": "latent",
    }  # fmt: skip
    call = partial(subject.pipe, **two)
    return Peers(
        guided_steps=guided, rows_saved=1 - ours.evaluations / (2 * steps),
        time_saved={name: paired_saving(seconds[name], seconds[_STOCK]) for name in (_CALLBACK, _OURS)},
        callback_difference=float((theirs.latents - ours.latents).abs().max()),
        callback_batch=_outcome(partial(call, callback_on_step_end=callback), call),
        stock_guider=_outcome(partial(call, guider=ClassifierFreeGuidance(stop=0.5)), call),
        faster_cache=_outcome(partial(_with_faster_cache, subject, two), call),
    )  # fmt: skip


def _outcome(run: Callable[[], Any], plain: Callable[[], Any]) -> str:
    """Return what a run did in one line: its error, or whether it drew anything else than the plain one."""
    try:
        images = run().images
    except Exception as error:  # whatever it is, it is what is reported
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    same = torch.equal(torch.as_tensor(images), torch.as_tensor(plain().images))
    return "ignored without a word: full CFG to the bit" if same else "runs"


def _with_faster_cache(subject: Subject, call: dict[str, Any]) -> Any:
    """Run with FasterCache as its documentation has it, on a copy of the UNet: its hooks stay."""
    pipe = type(subject.pipe).from_pipe(subject.pipe)
    pipe.unet = copy.deepcopy(subject.pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    config = FasterCacheConfig(
        unconditional_batch_skip_range=5, unconditional_batch_timestep_skip_range=(-1, 641),
        attention_weight_callback=lambda _: 0.5, tensor_format="BCHW", current_timestep_callback=lambda: 500,
    )  # fmt: skip
    apply_faster_cache(pipe.unet, config)
    return pipe(**call)
