"""The starts of the golden noise benchmark: which there are, what a plain run could do instead, and their images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfnoise.benchmarks.guidance_runs import Subject, draw
from hfnoise.pipelines import (
    ConditioningNoise,
    InitialNoise,
    NoiseLevelGuidance,
    PathSearch,
    RandomSearch,
    ReDenoise,
    SeedVariation,
    ZeroOrderSearch,
    guide,
)
from hfnoise.pipelines.noise_search import NoiseSearch
from hfnoise.worlds.digits_verifier import digit_verifier

GOLDEN, BEST_OF = "ReDenoise", {2: "best of 2", 4: "best of 4"}
NLG = "Noise Level Guidance, {} steps"
# The paper's largest step of Noise Level Guidance, 0.5, in units of the norm of 256 numbers.
PAPER_STEP = 0.5 / 16
# Scales that plain runs are swept over, beside those asked for.
SWEEP = (1.5, 3.0, 6.0)
# What they cost: a network of golden noise counts as one evaluation.
_NETWORK, _REDENOISE = 1, 3
# Images that zero-order search and paths may make of a sample: those of best of 4.
_SEARCHED = 4
_OTHER_SEEDS = 10_000


@dataclass(frozen=True)
class Start:
    """Images of one start and seed, and what they cost.

    Args:
        images (`torch.Tensor` of shape `(count, channels, 16, 16)`): in [0, 1].
        evaluations (`float`): of the UNet for an image; a network of golden noise counts as one.
        seconds (`float`): of the processor for an image.
    """

    images: Tensor
    evaluations: float
    seconds: float


@dataclass(frozen=True)
class Plain:
    """A plain run.

    Args:
        steps (`int`): of the scheduler.
        scale (`float`): of guidance.
    """

    steps: int
    scale: float

    @property
    def evaluations(self) -> int:
        """For an image."""
        return self.steps * branches(self.scale)

    def __str__(self) -> str:
        return f"CFG {self.scale:g}, {self.steps} steps"


def branches(scale: float) -> int:
    """Return the evaluations of a step."""
    return 1 if scale == 1 else 2


def plain_runs(steps: int, scales: Sequence[float]) -> list[Plain]:
    """Return the plain runs that refined ones are compared with.

    Of every scale asked for: as many steps as the evaluations of ReDenoise, of best of 2 and of best of 4 pay. Of
    these scales and of those of a sweep: as many steps as are asked for; and with guidance as many as a run without
    it costs after a network of golden noise, and after ReDenoise.

    Args:
        steps (`int`): asked for.
        scales (sequence of `float`): asked for.
    """
    found = []
    for scale in scales:
        cost = steps * branches(scale)
        found += [Plain(total // branches(scale), scale) for total in (cost, cost + _REDENOISE, 2 * cost, 4 * cost)]
    for scale in (*scales, *SWEEP):
        found += [Plain(steps, scale)]
        if scale != 1:
            found += [Plain((steps + extra) // 2, scale) for extra in (_NETWORK, _REDENOISE)]
    return sorted(set(found), key=lambda run: (run.scale, run.steps))


def members(
    subject: Subject, checkpoint: str, nets: Mapping[str, InitialNoise], steps: int, scale: float
) -> dict[str, InitialNoise]:
    """Return what refines the start, by name.

    The largest step of Noise Level Guidance is the paper's; its 20 steps, too, are for runs without guidance.

    Args:
        subject ([`~hfnoise.benchmarks.guidance_runs.Subject`]): who draws.
        checkpoint (`str`): whose verifier leads the searches.
        nets (`dict`): trained networks by name.
        steps (`int`), scale (`float`): of the runs, which a search has to pay.
    """
    verifier = digit_verifier("verifier", checkpoint, subject.world)
    cost = steps * branches(scale)
    counts = (5, 20) if scale == 1 else (5,)
    return {
        GOLDEN: ReDenoise(),
        **nets,
        **{NLG.format(count): NoiseLevelGuidance(count, max_relative_step=PAPER_STEP) for count in counts},
        **{name: RandomSearch(verifier, count * cost) for count, name in BEST_OF.items()},
        # Three neighbours, or two branches of two paths, and what they come from: the images of best of 4.
        "zero-order search": ZeroOrderSearch(verifier, _SEARCHED * cost, neighbours=_SEARCHED - 1),
        "search over paths": PathSearch(verifier, _SEARCHED * cost),
        "SeedVariation, 0.5": SeedVariation(0.5),
        "ConditioningNoise, 0.3": ConditioningNoise(0.3),
    }


def plain_start(subject: Subject, labels: Tensor, seed: int, run: Plain, **call: Any) -> Start:
    """Return the images of a plain run; those of one seed have the same noise in every run."""
    begin = time.process_time()
    drawn = draw(subject, labels, seed, run.steps, run.scale, **call)
    return Start(drawn.images, drawn.evaluations, (time.process_time() - begin) / len(labels))


def refined_start(subject: Subject, labels: Tensor, seed: int, run: Plain, member: InitialNoise, **call: Any) -> Start:
    """Return the images of a run from refined noise, of a search those that it found."""
    if isinstance(member, NoiseSearch):
        return _searched(subject, labels, seed, run, member)
    # Of noise beside that which all start from.
    generator = torch.Generator().manual_seed(_OTHER_SEEDS + seed)
    begin = time.process_time()
    with guide(subject.pipe, initial_noise=member):
        drawn = draw(subject, labels, seed, run.steps, run.scale, generator=generator, **call)
    seconds = (time.process_time() - begin) / len(labels)
    report: Any = getattr(member, "report", None)
    return Start(drawn.images, drawn.evaluations + report.evaluations, seconds)


def _searched(subject: Subject, labels: Tensor, seed: int, run: Plain, search: NoiseSearch) -> Start:
    begin = time.process_time()
    search.latents(
        subject.pipe, [subject.world.prompt(row) for row in labels.tolist()], num_inference_steps=run.steps,
        guidance_scale=run.scale, latents=subject.noise(len(labels), seed),
    )  # fmt: skip
    seconds = (time.process_time() - begin) / len(labels)
    assert search.images is not None
    assert search.trace is not None
    return Start(search.images, float(search.trace.evaluations), seconds)


def variations(subject: Subject, labels: Tensor, seed: int, steps: int, scale: float) -> dict[str, Start]:
    """Return variations of one image a prompt, by what varies them; `"plain"` are the images of independent seeds.

    Args:
        subject ([`~hfnoise.benchmarks.guidance_runs.Subject`]): who draws.
        labels (`torch.Tensor`): in turns of all combinations.
        seed (`int`): of the noise.
        steps (`int`), scale (`float`): of the runs.
    """
    run, every = Plain(steps, scale), len(subject.world.combinations())
    one = subject.noise(every, seed).repeat(len(labels) // every, 1, 1, 1)
    found = {"independent seeds": plain_start(subject, labels, seed, run)}
    found["one seed"] = plain_start(subject, labels, seed, run, latents=one)
    made: list[InitialNoise] = [SeedVariation(strength) for strength in (0.3, 0.6)]
    made += [ConditioningNoise(strength) for strength in (0.2, 0.4)]
    for member in made:
        name = f"{type(member).__name__}, {getattr(member, 'strength', None):g}"
        found[name] = refined_start(subject, labels, seed, run, member, latents=one)
    return found


def overhead(subject: Subject, net: Any, count: int = 64, repeats: int = 5) -> float:
    """Return the time of a network, in evaluations of the UNet for the same batch: each the fastest of some.

    Args:
        subject ([`~hfnoise.benchmarks.guidance_runs.Subject`]): who draws.
        net ([`~hfnoise.pipelines.noise_nets.NoiseNet`]): that is timed.
        count (`int`, defaults to `64`): of the batch.
        repeats (`int`, defaults to `5`): of each.
    """
    noise, pipe = subject.noise(count, 0), subject.pipe
    words = [subject.world.prompt(row) for row in subject.labels(count)[:count].tolist()]
    with torch.no_grad():
        states = pipe.encode_prompt(words, "cpu", 1, False)[0]
        runs = {"net": lambda: net(noise, states), "unet": lambda: pipe.unet(noise, 999, states)}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                begin = time.process_time()
                run()
                seconds[name].append(time.process_time() - begin)
    return min(seconds["net"]) / min(seconds["unet"])
