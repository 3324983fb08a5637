"""What pairs of noise and golden noise hold, before a network is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hfnoise.latents.singular_values import tile_shape, tiled

# Frequencies below a quarter of the highest count as low: a map of a quarter of the side, as in NoisePromptNet.
_LOW_SHARE = 4


@dataclass(frozen=True)
class PairDiagnosis:
    """How the changes from noise to golden noise are made; all shares are of their energy, the mean of |delta|^2.

    Args:
        pairs (`int`), prompts (`int`): how many.
        relative_size (`float`): mean of |delta| / |noise|.
        prompt_share (`float`): what the mean over the other noises of the same prompt explains: what a network that
            does not look at the noise can reach; NaN if no prompt has two pairs.
        low_frequency_share (`float`): what is left of the changes at a quarter of their resolution.
        singular_value_share (`float`): what a change of the singular values of the noise alone can express, the most
            that the branch of NPNet that has them can reach; about 1 / (2 side).

    Example:
        >>> from hfnoise.latents.pair_diagnosis import PairDiagnosis
        >>> print(PairDiagnosis(10, 2, 0.3, 0.8, 0.7, 0.06))
        10 pairs of 2 prompts; the change is 0.300 of the noise; of its energy the prompt explains 0.800, low
        frequencies hold 0.700, singular values can express 0.060
    """

    pairs: int
    prompts: int
    relative_size: float
    prompt_share: float
    low_frequency_share: float
    singular_value_share: float

    def __str__(self) -> str:
        return (
            f"{self.pairs} pairs of {self.prompts} prompts; the change is {self.relative_size:.3f} of the noise; of "
            f"its energy the prompt explains {self.prompt_share:.3f}, low frequencies hold "
            f"{self.low_frequency_share:.3f}, singular values can express {self.singular_value_share:.3f}"
        )


def diagnose_pairs(noise: Tensor, delta: Tensor, prompts: Sequence[object]) -> PairDiagnosis:
    """Return what pairs of noise and change hold.

    Args:
        noise (`torch.Tensor` of shape `(pairs, channels, height, width)`): of unit variance.
        delta (`torch.Tensor` of the same shape): golden noise minus noise.
        prompts (sequence, one a pair): equal for equal prompts.

    Raises:
        ValueError: if the sizes do not match, or nothing changes.

    Example:
        >>> import torch
        >>> from hfnoise.latents.pair_diagnosis import diagnose_pairs
        >>> noise, change = torch.randn(4, 4, 8, 8), torch.ones(2, 4, 8, 8).repeat(2, 1, 1, 1)
        >>> round(diagnose_pairs(noise, change, ["a", "b", "a", "b"]).prompt_share, 3)
        1.0
    """
    if noise.shape != delta.shape or noise.dim() != 4 or len(prompts) != len(noise):
        raise ValueError(
            "noise and delta must be (pairs, channels, height, width) with a prompt a pair, got "
            f"{tuple(noise.shape)}, {tuple(delta.shape)} and {len(prompts)} prompts."
        )
    noise, delta = noise.double(), delta.double()
    energy = float(delta.square().sum())
    if not energy > 0:
        raise ValueError("delta is 0 in all pairs, or not finite: there is nothing to learn.")
    relative = (delta.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)).mean()
    height, width = (max(1, side // _LOW_SHARE) for side in delta.shape[-2:])
    small = F.adaptive_avg_pool2d(delta, (height, width))
    # Each number of the small map stands for as many of the large one as it is the mean of.
    low = float(small.square().sum()) * delta[0].numel() / small[0].numel()
    names = list(dict.fromkeys(prompts))
    return PairDiagnosis(
        len(delta),
        len(names),
        float(relative),
        _prompt_share(delta, prompts),
        low / energy,
        _diagonal(noise, delta) / energy,
    )


def _prompt_share(delta: Tensor, prompts: Sequence[object]) -> float:
    members: dict[object, list[int]] = {}
    for row, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(row)
    left = energy = 0.0
    for rows in members.values():
        if len(rows) > 1:
            own = delta[rows]
            others = (own.sum(0) - own) / (len(rows) - 1)
            left += float((own - others).square().sum())
            energy += float(own.square().sum())
    return 1.0 - left / energy if energy else float("nan")


def _diagonal(noise: Tensor, delta: Tensor) -> float:
    """Return the energy of the change that is diagonal in the singular vectors of the noise, tiled as NPNet does."""
    rows, _ = tile_shape(noise.shape[1])
    left, _, right = torch.linalg.svd(tiled(noise, rows), full_matrices=False)
    diagonal = torch.einsum("bji,bjk,bik->bi", left, tiled(delta, rows), right)
    return float(diagonal.square().sum())
