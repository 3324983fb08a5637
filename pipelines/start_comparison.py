"""Whether an initial noise is worth it: images from the same noise with it and without, as a verifier sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from hfnoise.intervals import wilson_interval
from hfnoise.pipelines.guided import guide
from hfnoise.pipelines.initial_noise import InitialNoise
from hfnoise.pipelines.verifiers import Verifier, check_verifier, verified


@dataclass(frozen=True)
class StartComparison:
    """What [`compare_starts`] returns.

    Args:
        images (`int`): from each start.
        win_rate (`float`): share of them that the verifier likes better from the refined start; equal ones count half.
        interval (pair of `float`): of the win rate, at 95 % (Wilson 1927).
        score_plain, score_refined (`float`): means of the verifier.
        plain, refined (`dict[str, float]`): of the images of each start, by the `summary` that was given.

    Example:
        >>> from hfnoise.pipelines.start_comparison import StartComparison
        >>> print(StartComparison(64, 0.75, (0.63, 0.84), 1.0, 1.5))
        refined starts win 75.0 % of 64 pairs of images (95 %: 63.0 to 84.0); mean score 1 -> 1.5
    """

    images: int
    win_rate: float
    interval: tuple[float, float]
    score_plain: float
    score_refined: float
    plain: dict[str, float] = field(default_factory=dict)
    refined: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        low, high = self.interval
        lines = [
            f"refined starts win {self.win_rate:.1%} of {self.images} pairs of images (95 %: {100 * low:.1f} to "
            f"{100 * high:.1f}); mean score {self.score_plain:.4g} -> {self.score_refined:.4g}".replace("%", " %", 1)
        ]
        lines += [f"{name}: {value:.4g} -> {self.refined[name]:.4g}" for name, value in self.plain.items()]
        return "; ".join(lines)


def compare_starts(
    pipe: Any,
    initial_noise: InitialNoise,
    prompts: Sequence[str],
    verifier: Verifier,
    *,
    images: int = 64,
    seed: int = 0,
    batch_size: int = 8,
    summary: Callable[[Tensor, Sequence[str]], dict[str, float]] | None = None,
    **call: Any,
) -> StartComparison:
    """Return how images from an initial noise compare with those of the same seeds without it.

    Under `accelerate launch` every process draws its share, and all return the same. The refined run costs more: a
    comparison at equal cost has to give the plain one as much.

    Args:
        pipe (`DiffusionPipeline`): of text to image.
        initial_noise ([`InitialNoise`]): what refines.
        prompts (sequence of `str`): taken in turn.
        verifier (`Callable`): of images `(batch, channels, height, width)` in [0, 1] and prompts; best one that the
            initial noise was not trained or searched by.
        images (`int`, defaults to `64`): from each start, at least 1.
        seed (`int`, defaults to `0`): another one draws other noise.
        batch_size (`int`, defaults to `8`): images that are drawn together.
        summary (`Callable`, *optional*): of all images of a start and their prompts, returns figures by name.
        **call: of the pipeline's call.

    Raises:
        TypeError, ValueError: if the verifier is none, or the initial noise cannot serve in the pipeline.

    Example:
        >>> from hfnoise.pipelines import ReDenoise
        >>> from hfnoise.pipelines.start_comparison import compare_starts
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> def brightness(images, prompts):
        ...     return images.mean((1, 2, 3))
        >>> pipe, call = new_digits_pipeline(width=8), {"num_inference_steps": 2}
        >>> compare_starts(pipe, ReDenoise(), ["the digit two"], brightness, images=2, **call).images
        2
    """
    check_verifier(verifier)
    if not prompts or isinstance(prompts, str) or images < 1 or batch_size < 1:
        raise ValueError(
            f"needed are a list of prompts, and at least 1 image and a batch of 1; got {prompts!r:.60}, {images} and "
            f"{batch_size}."
        )
    state = PartialState()
    own = range(images)[state.process_index :: state.num_processes]
    base = int.from_bytes(hashlib.blake2b(f"compared starts/{seed}".encode(), digest_size=4).digest(), "big")
    rows: list[tuple[int, float, float, Tensor | None, Tensor | None]] = []
    for start in range(0, len(own), batch_size):
        numbers = own[start : start + batch_size]
        words = [prompts[number % len(prompts)] for number in numbers]
        drawn = []
        for noise in (None, initial_noise):
            generators = [torch.Generator().manual_seed(base + number) for number in numbers]
            with guide(pipe, initial_noise=noise) as guided:
                found = guided(words, generator=generators, output_type="pt", **call).images
            drawn.append((verified(verifier, found, words).detach().tolist(), found.float().cpu()))
        (plain, plain_images), (refined, refined_images) = drawn
        for place, number in enumerate(numbers):
            kept = (None, None) if summary is None else (plain_images[place], refined_images[place])
            rows.append((number, plain[place], refined[place], *kept))
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    plain_scores, refined_scores = [row[1] for row in rows], [row[2] for row in rows]
    wins = sum(1.0 if b > a else 0.5 if b == a else 0.0 for a, b in zip(plain_scores, refined_scores, strict=True))
    words = [prompts[row[0] % len(prompts)] for row in rows]
    figures: list[dict[str, float]] = [{}, {}]
    if summary is not None:
        figures = [summary(torch.stack([row[column] for row in rows]), words) for column in (3, 4)]  # type: ignore[misc]
    count = len(rows)
    return StartComparison(
        count,
        wins / count,
        wilson_interval(wins, count),
        sum(plain_scores) / count,
        sum(refined_scores) / count,
        *figures,
    )
