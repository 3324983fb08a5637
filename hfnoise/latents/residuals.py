"""How images scatter about the mean that One More Step starts from."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfnoise.latents.cosine_basis import check_has_space, cosine_amplitudes, cosine_waves


@dataclass(frozen=True)
class ResidualStatistics:
    """Mean and covariance of the lowest spatial frequencies of r = x0 - x0_hat: by default of its channel means only.

    Ours, beyond the paper. One More Step starts from the mean of the images of a prompt, so that all come out about as
    bright as that mean: their spread is too small. A start x0_hat + r, with r drawn from these, has the spread of the
    data too; it is offset noise of a size that is measured and not guessed. An amplitude of variance P has the
    signal-to-noise ratio height * width * P * alpha_bar / (1 - alpha_bar) at the first timestep, so only the lowest
    frequencies of an image, which have much of its variance, are seen there; finer detail drowns in noise.

    Beside the channel means there may be the amplitudes of the lowest frequencies x frequencies waves of the DCT-II
    ([`~hfnoise.latents.cosine_basis.cosine_basis`]): light that falls from one side, a dark foreground. Each has a
    mean and a covariance of its own between channels; different frequencies are taken to be independent, which they
    are in data that are stationary up to their edges, and nearly in photographs.

    Waves are counted per image, half periods from edge to edge, and not per latent pixel: a picture of twice the
    pixels shows the same scene, with the same ramp from edge to edge and the same variance a pixel, as its mean has.
    Statistics of frequencies per pixel would be those of a cutout, and their mean would scatter a quarter as much
    there. So what was fitted at one size and aspect ratio is drawn at every other.

    Args:
        mean (sequence of `float`, one a channel): about 0 for a well-trained module.
        covariance (sequence of sequences of `float`, channels x channels).
        spectra (sequence of [`ResidualStatistics`], defaults to none): of the other frequencies, frequencies^2 - 1 of
            them, by row: those along the width first. Amplitudes are of waves of mean square 1.

    Raises:
        ValueError: if the sizes do not match, a number is not finite, or a covariance is not symmetric or has a
            negative eigenvalue.

    Example:
        >>> import torch
        >>> from hfnoise.latents import ResidualStatistics
        >>> residuals = torch.tensor([-0.1, 0.1]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
        >>> statistics = ResidualStatistics.fit(residuals)
        >>> round(statistics.covariance[0][0], 6)
        0.02
        >>> ResidualStatistics.fit(residuals, frequencies=2).frequencies
        2
    """

    mean: Sequence[float]
    covariance: Sequence[Sequence[float]]
    spectra: Sequence[ResidualStatistics] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(entry) for entry in self.mean))
        object.__setattr__(self, "covariance", tuple(tuple(map(float, row)) for row in self.covariance))
        object.__setattr__(self, "spectra", tuple(self.spectra))
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
        if self.frequencies**2 != 1 + len(self.spectra):
            raise ValueError(
                f"there are spectra of {len(self.spectra)} frequencies beside the mean; k x k frequencies have "
                "k^2 - 1 of them: 3, 8, 15, ..."
            )
        if any(part.spectra or part.channels != self.channels for part in self.spectra):
            raise ValueError(
                f"each spectrum needs a mean and a covariance of {self.channels} channels, and no spectra."
            )

    @classmethod
    def fit(cls, residuals: Tensor, frequencies: int = 1) -> ResidualStatistics:
        """Return the statistics of residuals, with the unbiased covariance.

        Args:
            residuals (`torch.Tensor` of shape `(samples, channels, ..., height, width)`): x0 - x0_hat; or their
                channel means, of shape `(samples, channels)`.
            frequencies (`int`, defaults to `1`): along each side; 1 is the channel means only.

        Raises:
            ValueError: with less than two samples, or fewer pixels than frequencies.
        """
        if residuals.dim() < 2 or len(residuals) < 2:
            raise ValueError(
                f"a covariance needs at least two residuals of shape (channels, ...), got {tuple(residuals.shape)}."
            )
        check_frequencies(frequencies)
        # float64: the mean of many pixels, squared.
        return cls.fit_amplitudes(cosine_amplitudes(residuals, frequencies))

    @classmethod
    def fit_amplitudes(cls, amplitudes: Tensor) -> ResidualStatistics:
        """Return the statistics of residuals of which [`~hfnoise.latents.cosine_basis.cosine_amplitudes`] are given.

        Args:
            amplitudes (`torch.Tensor` of shape `(samples, channels, frequencies^2)`): at least two samples.
        """
        first, *others = (_moments(part) for part in amplitudes.double().unbind(-1))
        return cls(*first, [cls(*part) for part in others])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ResidualStatistics:
        """Return the statistics that [`to_config`] wrote.

        Raises:
            ValueError: if an entry is missing or unknown.
        """
        if set(config) | {"spectra"} != {"mean", "covariance", "spectra"}:
            raise ValueError(
                f"residual statistics have the entries 'mean' and 'covariance', and may have 'spectra', got "
                f"{sorted(config)}."
            )
        return cls(config["mean"], config["covariance"], [cls.from_config(part) for part in config.get("spectra", ())])

    def to_config(self) -> dict[str, Any]:
        """Return lists of floats, for the config of a module."""
        config: dict[str, Any] = {"mean": list(self.mean), "covariance": [list(row) for row in self.covariance]}
        # Without them it is what an hfnoise that knows of no frequencies reads.
        return config | ({"spectra": [part.to_config() for part in self.spectra]} if self.spectra else {})

    @property
    def frequencies(self) -> int:
        """How many waves there are along each side, the mean among them."""
        return math.isqrt(1 + len(self.spectra))

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
        residuals: Tensor = mean + normal.float() @ _symmetric_root(tuple(map(tuple, self.covariance))).to(
            normal.device
        )
        return residuals

    def draw(self, normal: Tensor, size: Sequence[int]) -> Tensor:
        """Return residual images made of standard normal numbers.

        Args:
            normal (`torch.Tensor` of shape `(batch, frequencies^2, channels)`).
            size (sequence of `int`): of the image, (..., height, width), any that has as many pixels as there are
                frequencies; all frames of a video get the same. With one frequency any number of sides.

        Returns:
            `torch.Tensor` of shape `(batch, channels, *size)`, in float32; each sample depends on its numbers only.

        Raises:
            ValueError: if the number of channels is another one, or the image is too small.
        """
        means = self.transform(normal[:, 0])
        shape = (*means.shape, *size)
        if not self.spectra:
            return means.reshape(*means.shape, *[1] * len(size)).expand(shape)
        check_has_space(shape)
        others = [part.transform(normal[:, number]) for number, part in enumerate(self.spectra, 1)]
        waves = cosine_waves(torch.stack([means, *others], -1), size[-2], size[-1])
        return waves.reshape(*means.shape, *[1] * (len(size) - 2), *size[-2:]).expand(shape)


# By its numbers: a module's statistics are read out of its config again at every call.
@functools.lru_cache(maxsize=64)
def _symmetric_root(covariance: tuple[tuple[float, ...], ...]) -> Tensor:
    matrix = torch.tensor(covariance, dtype=torch.float64)
    # The symmetric root: of all roots the one that does not depend on how a library orders eigenvectors.
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root: Tensor = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    return root.float()


def check_frequencies(frequencies: Any, name: str = "frequencies") -> None:
    """Raise ValueError unless a number of frequencies is a whole one of at least 1.

    Example:
        >>> from hfnoise.latents.residuals import check_frequencies
        >>> check_frequencies(2)
    """
    if isinstance(frequencies, bool) or not isinstance(frequencies, int) or frequencies < 1:
        raise ValueError(
            f"{name} is {frequencies!r}; give a whole number of at least 1, which is the channel means only."
        )


def _moments(samples: Tensor) -> tuple[list[float], list[list[float]]]:
    centred = samples - samples.mean(0)
    covariance = centred.T @ centred / (len(samples) - 1)
    return samples.mean(0).tolist(), covariance.tolist()
