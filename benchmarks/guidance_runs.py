"""Runs of the digits worlds under a guider, with what they cost and what they are worth."""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfnoise.benchmarks.reporting import mean_and_error
from hfnoise.benchmarks.structural_similarity import structural_similarity
from hfnoise.pipelines import guide
from hfnoise.worlds.digit_world import DigitWorld
from hfnoise.worlds.digits_checkpoints import CHECKPOINTS, WORLDS, checkpoint_path, load_digits_pipeline
from hfnoise.worlds.digits_score import score_digit_images


@dataclass(frozen=True)
class Subject:
    """A trained world that is drawn from.

    Args:
        name (`str`): of the checkpoint, or its folder.
        pipe (`StableDiffusionPipeline`): of stock classes.
        world ([`~hfnoise.worlds.digit_world.DigitWorld`]): whose prompts.
    """

    name: str
    pipe: Any
    world: DigitWorld

    @property
    def stem(self) -> str:
        """What results are named after: `"digits"`, `"digits_weak"` and so on."""
        return self.name.replace("-sd", "").replace("-", "_")

    def labels(self, count: int) -> Tensor:
        """Return labels of at least `count` images, all combinations equally often."""
        every = self.world.combinations()
        return every.repeat(-(-count // len(every)), 1)

    def noise(self, count: int, seed: int) -> Tensor:
        """Return the noise that `count` images start from."""
        config = self.pipe.unet.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load_subject(checkpoint: str, world: str | None = None) -> Subject:
    """Return a trained world.

    Args:
        checkpoint (`str`): name of a shipped one, or a folder.
        world (`str`, *optional*): needed for a folder: `"digits"` or `"coloured-digits"`.

    Raises:
        ValueError: if there is no such checkpoint, or a folder comes without its world.
    """
    folder = checkpoint_path(checkpoint)
    found = CHECKPOINTS.get(checkpoint) or WORLDS.get(world or "")
    if found is None:
        raise ValueError(f"which world does {checkpoint!r} draw? Give --world, one of {', '.join(WORLDS)}.")
    return Subject(Path(folder).name, load_digits_pipeline(checkpoint), found)


def add_subject_options(parser: argparse.ArgumentParser) -> None:
    """Add what [`load_subject`] is told to a command line: `--checkpoint` and `--world`."""
    parser.add_argument("--checkpoint", default="digits-sd", help="name of a shipped one, or a folder")
    parser.add_argument("--world", help="of a folder: digits or coloured-digits")


@dataclass(frozen=True)
class Drawn:
    """What a run drew.

    Args:
        latents (`torch.Tensor` of shape `(count, 4, 8, 8)`): the end of the run.
        decoded (`torch.Tensor` of shape `(count, channels, 16, 16)`): by the autoencoder, not clipped to [-1, 1].
        evaluations (`float`): of the UNet, per image.
    """

    latents: Tensor
    decoded: Tensor
    evaluations: float

    @property
    def images(self) -> Tensor:
        """The images in [0, 1]."""
        return (self.decoded / 2 + 0.5).clamp(0, 1)

    @property
    def clipped(self) -> float:
        """The share of the pixels that leave the range and are clipped."""
        return float((self.decoded.abs() > 1).float().mean())

    @property
    def root_mean_square(self) -> float:
        """Of the latents."""
        return float(self.latents.square().mean().sqrt())


def draw(
    subject: Subject, labels: Tensor, seed: int, steps: int, scale: float, guider: Any = None, **call: Any
) -> Drawn:
    """Return the images of labels; an image has the same noise whatever the guider and the scale.

    Args:
        subject ([`Subject`]): who draws.
        labels (`torch.Tensor` of shape `(count, attributes)`): what to ask for.
        seed (`int`): of the noise.
        steps (`int`): of the scheduler.
        scale (`float`): of guidance; 1 is none.
        guider (`UpdateGuidance`, *optional*): the pipeline's own classifier-free guidance if `None`.
        **call: more arguments of the pipeline.
    """
    pipe = subject.pipe
    arguments = {
        "prompt": [subject.world.prompt(row) for row in labels.tolist()], "num_inference_steps": steps,
        "guidance_scale": scale, "latents": subject.noise(len(labels), seed), "output_type": "latent", **call,
    }  # fmt: skip
    if guider is None:
        latents = pipe(**arguments).images
        evaluations = float(steps * (1 if scale == 1 else 2))
    else:
        with guide(pipe, guider):
            latents = pipe(**arguments).images
        evaluations = guider.report.evaluations / len(labels)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return Drawn(latents, decoded, evaluations)


def scores(drawn: Drawn, labels: Tensor, checkpoint: str, reference: Drawn | None = None) -> dict[str, float]:
    """Return what images are worth; with a reference also how near they are to it.

    Args:
        drawn ([`Drawn`]): the images.
        labels (`torch.Tensor`): what was asked for.
        checkpoint (`str`): whose verifier and judge are asked.
        reference ([`Drawn`], *optional*): the same images by full guidance.
    """
    found = asdict(score_digit_images(drawn.images, labels, checkpoint))
    found.pop("attribute_accuracy")
    found |= {"evaluations": drawn.evaluations, "clipped": drawn.clipped, "latent_rms": drawn.root_mean_square}
    if reference is not None:
        found["ssim"] = float(structural_similarity(drawn.images, reference.images).mean())
        difference = (drawn.latents - reference.latents).norm()
        found["latent_error"] = float(difference / reference.latents.norm())
    return found


def summary(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return mean and standard error over seeds of everything that was measured."""
    made = {}
    for name in runs[0]:
        mean, error = mean_and_error([run[name] for run in runs])
        made[name] = {"mean": mean, "error": None if math.isnan(error) else error}
    return made


def paired_times(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of runs that take turns, in an order that rotates; the first turn of each is not counted.

    Args:
        runs (`dict[str, Callable]`): what is timed.
        repeats (`int`): turns of each, after the first.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # its walk through the libraries would hit the variants at random
    try:
        for turn in range(repeats + 1):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                start = time.perf_counter()
                runs[name]()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        gc.unfreeze()
    return seconds


def paired_saving(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Return the median share of the time of the base that a run saves, turn by turn."""
    return 1 - statistics.median(own / other for own, other in zip(seconds, base, strict=True))
