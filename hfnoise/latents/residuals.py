"""How images scatter about the mean that One More Step starts from."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ResidualStatistics:
    """Mean and covariance of the channel means of r = x0 - x0_hat.

    Ours, beyond the paper. One More Step starts from the mean of the images of a prompt, so that all come out about as
    bright as that mean: their spread is too small. A start x0_hat + r, with r drawn from these, has the spread of the
    data too; it is offset noise of a size that is measured and not guessed. Only channel means are kept, whose
    signal-to-noise ratio at the first timestep grows with the size of the image; finer detail drowns in noise there.

    Args:
        mean (sequence of `float`, one a channel): about 0 for a well-trained module.
        covariance (sequence of sequences of `float`, channels x channels).

    Raises:
        ValueError: if the sizes do not match, a number is not finite, or the covariance is not symmetric or has a
            negative eigenvalue.

    Example:
        >>> import torch
        >>> from hfnoise.latents import ResidualStatistics
        >>> residuals = torch.tensor([-0.1, 0.1]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
        >>> statistics = ResidualStatistics.fit(residuals)
        >>> round(statistics.covariance[0][0], 6)
        0.02
    """

    mean: Sequence[float]
    covariance: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(entry) for entry in self.mean))
        object.__setattr__(self, "covariance", tuple(tuple(map(float, row)) for row in self.covariance))
        sizes = {len(self.covariance), *map(len, self.covariance)}
        if not self.mean or sizes != {len(self.mean)}:
            raise ValueError(
                f"the mean has {len(self.mean)} numbers and the covariance rows and columns of {sorted(sizes)}: both "
                "need one a channel."
            )
        numbers = [*self.mean, *(entry for row in self.covariance for entry in row)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("the residual statistics hold numbers that are not finite: fit them again.")
        matrix = torch.tensor(self.covariance, dtype=torch.float64)
        size = float(matrix.abs().max())
        # Of float32 data: sums of thousands of numbers are right to about 1e-5.
        if not torch.allclose(matrix, matrix.T, rtol=0.0, atol=1e-5 * size):
            raise ValueError("the covariance of the residuals is not symmetric.")
        if float(torch.linalg.eigvalsh((matrix + matrix.T) / 2).min()) < -1e-5 * size:
            raise ValueError("the covariance of the residuals has a negative eigenvalue.")

    @classmethod
    def fit(cls, residuals: Tensor) -> ResidualStatistics:
        """Return the statistics of residuals, with the unbiased covariance.

        Args:
            residuals (`torch.Tensor` of shape `(samples, channels, ...)`): x0 - x0_hat, or their channel means of
                shape `(samples, channels)`.

        Raises:
            ValueError: with less than two samples.
        """
        if residuals.dim() < 2 or len(residuals) < 2:
            raise ValueError(
                f"a covariance needs at least two residuals of shape (channels, ...), got {tuple(residuals.shape)}."
            )
        # float64: the mean of many pixels, squared.
        means = residuals.flatten(2).mean(2, dtype=torch.float64) if residuals.dim() > 2 else residuals.double()
        centred = means - means.mean(0)
        covariance = centred.T @ centred / (len(means) - 1)
        return cls(means.mean(0).tolist(), covariance.tolist())

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ResidualStatistics:
        """Return the statistics that [`to_config`] wrote.

        Raises:
            ValueError: if an entry is missing or unknown.
        """
        if set(config) != {"mean", "covariance"}:
            raise ValueError(f"residual statistics have the entries 'mean' and 'covariance', got {sorted(config)}.")
        return cls(config["mean"], config["covariance"])

    def to_config(self) -> dict[str, Any]:
        """Return lists of floats, for the config of a module."""
        return {"mean": list(self.mean), "covariance": [list(row) for row in self.covariance]}

    @property
    def channels(self) -> int:
        """How many channels the latents have."""
        return len(self.mean)

    def transform(self, normal: Tensor) -> Tensor:
        """Return residuals made of standard normal numbers.

        Args:
            normal (`torch.Tensor` of shape `(batch, channels)`).

        Returns:
            `torch.Tensor` of shape `(batch, channels)`, in float32.

        Raises:
            ValueError: if the number of channels is another one.
        """
        if normal.shape[-1] != self.channels:
            raise ValueError(
                f"the residual statistics are of {self.channels} channels, and the latents have {normal.shape[-1]}."
            )
        mean = torch.tensor(self.mean, dtype=torch.float32, device=normal.device)
        root = _symmetric_root(tuple(map(tuple, self.covariance)))
        residuals: Tensor = mean + normal.float() @ root.to(normal.device, torch.float32)
        return residuals


# By its numbers: a module's statistics are read out of its config again at every call.
@functools.lru_cache(maxsize=16)
def _symmetric_root(covariance: tuple[tuple[float, ...], ...]) -> Tensor:
    matrix = torch.tensor(covariance, dtype=torch.float64)
    # The symmetric root: of all roots the one that does not depend on how a library orders eigenvectors.
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root: Tensor = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    return root
