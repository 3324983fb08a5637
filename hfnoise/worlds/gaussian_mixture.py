"""A mixture of Gaussians whose denoiser is known exactly: a world for rules of guidance, without a trained model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# The mixture of the golden vectors: classes, dimensions, directions of large variance, and their variances.
_CLASSES, _SIZE, _DIRECTIONS = 10, 64, 6
_VARIANCES, _REST, _POSTERIOR_POWER = (4.0, 0.5), 0.03, 0.02
_SPREAD = 0.8  # of the means


class GaussianMixture:
    """Class k is N(mu_k, V_k diag(lam) V_k' + s0 I); the unconditional one weighs the classes by their posterior.

    The posterior is raised to a small power first: an unconditional prediction as weak as that of a trained model.

    Args:
        vectors (`Mapping[str, Any]`): `mu` `(classes, size)`, `V` `(classes, size, directions)`, orthonormal, `lam`
            `(directions,)`, `s0`, `posterior_temp`, and `sigmas` `(steps + 1,)`, which end at 0; arrays or tensors.

    Example:
        >>> from hfnoise.worlds.gaussian_mixture import random_mixture
        >>> mixture = random_mixture(steps=4)
        >>> x, y = mixture.starts(3, seed=0)
        >>> mixture.run(x, y, lambda step, cond, uncond, x: cond).shape
        torch.Size([3, 64])
    """

    def __init__(self, vectors: Mapping[str, Any]) -> None:
        self.vectors = {name: torch.as_tensor(array) for name, array in vectors.items()}
        self.sigmas = self.vectors["sigmas"]
        self.steps = len(self.sigmas) - 1

    def starts(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return noise of the first level, `(count, size)`, and random classes, `(count,)`."""
        generator = torch.Generator().manual_seed(seed)
        classes, size = self.vectors["mu"].shape
        labels = torch.randint(classes, (count,), generator=generator)
        return self.sigmas[0] * torch.randn(count, size, generator=generator, dtype=torch.float64), labels

    def denoised(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return x0 given each class, `(batch, 10, 64)`, and the weights of the classes without one, `(batch, 10)`."""
        v = self.vectors
        variance = self.sigmas[step] ** 2
        offset = x[:, None] - v["mu"]
        along = torch.einsum("bkd,kdr->bkr", offset, v["V"])
        gain = (v["lam"] + v["s0"]) / (v["lam"] + v["s0"] + variance)
        rest = v["s0"] / (v["s0"] + variance)
        inside = torch.einsum("bkr,kdr->bkd", along, v["V"])
        means = v["mu"] + torch.einsum("bkr,kdr->bkd", gain * along, v["V"]) + rest * (offset - inside)
        spread = v["lam"] + v["s0"] + variance
        distance = (along**2 / spread).sum(-1) + ((offset - inside) ** 2).sum(-1) / (v["s0"] + variance)
        return means, torch.softmax(-distance / 2 * v["posterior_temp"], dim=1)

    def predictions(self, x: Tensor, y: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return x0 given the classes `y`, and without a class."""
        means, weights = self.denoised(x, step)
        return means[torch.arange(len(y)), y], (weights[..., None] * means).sum(1)

    def step(self, x: Tensor, guided: Tensor, step: int) -> Tensor:
        """Return the next state of DDIM: of an Euler step along the guided prediction."""
        return guided + (x - guided) * self.sigmas[step + 1] / self.sigmas[step]

    def run(self, x: Tensor, y: Tensor, guide: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return the end of a run; `guide(step, cond, uncond, x)` returns the guided x0."""
        for step in range(self.steps):
            x = self.step(x, guide(step, *self.predictions(x, y, step), x), step)
        return x


def random_mixture(steps: int = 20, seed: int = 0) -> GaussianMixture:
    """Return a mixture like that of the golden vectors, with the noise levels of Stable Diffusion.

    Args:
        steps (`int`, defaults to `20`): of a run, at least 1.
        seed (`int`, defaults to `0`): of means and directions.

    Raises:
        ValueError: for less than one step.

    Example:
        >>> from hfnoise.worlds.gaussian_mixture import random_mixture
        >>> [round(float(sigma), 2) for sigma in random_mixture(steps=3).sigmas]
        [14.61, 1.62, 0.03, 0.0]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(_CLASSES, _SIZE, 1 + _DIRECTIONS, generator=generator, dtype=torch.float64)
    return GaussianMixture(
        {
            "mu": _SPREAD * raw[..., 0], "V": torch.linalg.qr(raw[..., 1:])[0],
            "lam": torch.linspace(*_VARIANCES, _DIRECTIONS, dtype=torch.float64), "s0": _REST,
            "posterior_temp": _POSTERIOR_POWER, "sigmas": _sigmas(steps),
        }
    )  # fmt: skip


def _sigmas(steps: int) -> Tensor:
    """Return Stable Diffusion's noise levels at evenly spaced times, and 0."""
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, dim=0)
    levels = ((1 - signal) / signal).sqrt()
    times = torch.linspace(999, 0, steps, dtype=torch.float64)
    low = times.floor().long()
    high = (low + 1).clamp(max=999)
    between = levels[low] + (times - low) * (levels[high] - levels[low])
    return torch.cat([between, torch.zeros(1, dtype=torch.float64)])
