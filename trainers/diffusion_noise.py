"""The random numbers of an example, as a function of (seed, step, place in the global batch) and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfnoise.latents import numbered_seed


@dataclass(frozen=True)
class TrainingNoise:
    """The draws of a batch.

    Args:
        level (`Tensor` of shape `(batch,)`): uniform in [0, 1), float64: which noise level.
        dropout (`Tensor` of shape `(batch,)`): uniform in [0, 1), float64: whether the prompt is dropped.
        noise (`Tensor` of shape `(batch, ...)`): N(0, 1) of the shape of the latents, float32.
        offset (`Tensor` of shape `(batch, channels, 1, ...)`): N(0, 1), float32, one number a channel.
        perturbation (`Tensor`, *optional*): N(0, 1) like `noise`, float32.
    """

    level: Tensor
    dropout: Tensor
    noise: Tensor
    offset: Tensor
    perturbation: Tensor | None = None

    def to(self, device: Any) -> TrainingNoise:
        """Return the draws with the normal ones on a device.

        The uniform ones stay: what is chosen by them is chosen in float64, which not every device has.
        """
        extra = None if self.perturbation is None else self.perturbation.to(device)
        return TrainingNoise(self.level, self.dropout, self.noise.to(device), self.offset.to(device), extra)


def draw_training_noise(
    seed: int,
    step: int,
    positions: list[int],
    shape: tuple[int, ...],
    perturbation: bool = False,
    stream: str = "train",
) -> TrainingNoise:
    """Return the random numbers of the examples at some places of the global batch, on the CPU.

    `torch.randn` in `compute_loss` would draw the same noise on every process, since the Trainer seeds all alike, and
    other noise for another split of the batch. Here a row has a generator of its own, so its draws are the same on
    every number of processes, in every split by gradient accumulation, after a resume, and on every device; and an
    option that needs more numbers leaves the others as they are. Rows of one step never share a seed; with 2^32 seeds
    two rows of a long run may, in steps far apart.

    Args:
        seed (`int`): of the run.
        step (`int`): the global step, at least 0.
        positions (`list[int]`): (micro_step * world + rank) * per_device + row.
        shape (`tuple[int, ...]`): of one example's latents, channels first.
        perturbation (`bool`, defaults to `False`): draw `perturbation` too.
        stream (`str`, defaults to `"train"`): other names give independent numbers.

    Returns:
        [`TrainingNoise`]

    Example:
        >>> from hfnoise.trainers.diffusion_noise import draw_training_noise
        >>> both = draw_training_noise(0, 5, [2, 3], (4, 8, 8))
        >>> bool((draw_training_noise(0, 5, [3], (4, 8, 8)).noise[0] == both.noise[1]).all())
        True
    """
    count = len(positions)
    uniform = torch.empty(count, 2, dtype=torch.float64)
    noise = torch.empty(count, *shape)
    offset = torch.empty(count, shape[0])
    extra = torch.empty(count, *shape) if perturbation else None
    generator = torch.Generator()
    for row, position in enumerate(positions):
        # No two rows of a batch have the same.
        generator.manual_seed(numbered_seed(f"{stream}/{seed}/{step}", position))
        torch.rand(2, generator=generator, dtype=torch.float64, out=uniform[row])
        torch.randn(shape, generator=generator, out=noise[row])
        torch.randn(shape[0], generator=generator, out=offset[row])
        if extra is not None:
            torch.randn(shape, generator=generator, out=extra[row])
    return TrainingNoise(
        uniform[:, 0], uniform[:, 1], noise, offset.reshape(count, shape[0], *[1] * (len(shape) - 1)), extra
    )


def draw_levels(uniform: Tensor, levels: int, logit_mean: float | None = None, logit_std: float = 1.0) -> Tensor:
    """Return indices of noise levels.

    Args:
        uniform (`Tensor` of shape `(batch,)`): in [0, 1), float64.
        levels (`int`): how many there are.
        logit_mean (`float`, *optional*): `None` is uniform; else the index is `levels` times sigmoid(N(logit_mean,
            logit_std^2)), as in diffusers' `compute_density_for_timestep_sampling("logit_normal")` (SD3, arXiv
            2403.03206, equation 19). A flow-matching scheduler counts from pure noise at index 0.
        logit_std (`float`, defaults to `1.0`): above 0.

    Returns:
        `Tensor` of shape `(batch,)`, int64, in [0, levels).

    Example:
        >>> import torch
        >>> from hfnoise.trainers.diffusion_noise import draw_levels
        >>> draw_levels(torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64), 1000).tolist()
        [0, 500, 999]
    """
    share = uniform
    if logit_mean is not None:
        # The quantile function of the distribution, so that one uniform number serves both.
        share = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(uniform))
    return (share * levels).long().clamp(max=levels - 1)


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Return noise with an offset for each channel of each example: `--noise_offset` of diffusers' scripts.

    The mean of an image then has noise too that does not average out. It is not renormalised, as in the scripts.

    Args:
        noise (`Tensor` of shape `(batch, channels, ...)`): N(0, 1).
        offset (`Tensor` of shape `(batch, channels, 1, ...)`): N(0, 1).
        strength (`float`): at least 0; usual are 0.03 to 0.1.
    """
    return noise + strength * offset
