"""Correlated noise C^-1 Z as a stream, and the number of bands that suits a privacy budget (arXiv 2306.08153)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfnoise.privacy.participation import column_norms, single_participation_sensitivity
from hfnoise.privacy.toeplitz import (
    Coefficients,
    check_coefficients,
    check_count,
    inverse_coefficients,
    prefix_sum_error,
    toeplitz_strategy,
)


class CorrelatedNoise:
    """The rows of C^-1 Z, one per optimiser step, from white noise that can be drawn again.

    x_t = (z_t - sum_j c_j x_(t-j)) / c_0 over the last bands - 1 results (arXiv 2306.08153, algorithm 9), or with
    `inverse=True` x_t = sum_j c_j z_(t-j), which needs past white noise only. Add `clip_norm * sigma * sensitivity`
    times the result to the clipped sum of step t.

    Nothing is saved with a checkpoint: the white noise is keyed by (secret, step), so a resumed run computes the same
    numbers again. Steps asked for in their order cost one call of `white` and bands - 1 additions each, with
    bands - 1 tensors kept (for a C that is not banded: all that came before). A jump forward computes the steps
    between. A jump back, or a new object at step t, replays from step 0: t + 1 calls of `white` and (t + 1)
    (bands - 1) additions, since x_t depends on all earlier white noise. With `inverse=True` any order costs the same:
    `bands` calls of `white` per step and nothing kept.

    Formal guarantee: the noise is C^-1 Z up to the rounding of the dtype of `white`, if `white(t)` are independent
    standard normal and the same at every call. One step's result must be released with one sum only: the difference
    of two sums released under the same noise would have none.

    Args:
        strategy (`torch.Tensor` of shape `(bands,)`, floating): Toeplitz coefficients of C, or of C^-1 for
            `inverse=True`.
        steps (`int`): steps n of the run that participations and column norms are counted for, at least 1.
        white (`Callable[[int], torch.Tensor]`): returns z_t for step t: any shape, floating dtype and device, the
            same for all t. State and results have its dtype and device.
        inverse (`bool`, defaults to `False`): the coefficients are those of C^-1, as `"banded_inverse_sqrt"`.
        column_normalized (`bool`, defaults to `False`): divide each column of C by its norm, that is, multiply row t
            of the noise by sqrt(sum of c_j^2 over j <= n - 1 - t). The last bands - 1 columns are shorter than the
            others, so this takes noise away from the last steps at the same sensitivity, which becomes 1.

    Attributes:
        sensitivity (`float`): largest column norm of C: 1 for `"banded"` and with `column_normalized`. The caller
            multiplies the noise by it.
        bands (`int`): number of coefficients.

    Raises:
        ValueError: for unusable coefficients, steps outside of the run, or white noise that changes its shape.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.correlated_noise import CorrelatedNoise
        >>> white = lambda step: torch.full((1,), float(step + 1))
        >>> noise = CorrelatedNoise(torch.tensor([1.0, 0.5]), 10, white)
        >>> [noise.at(t).item() for t in range(3)], noise.at(1).item()
        ([1.0, 1.5, 2.25], 1.5)
    """

    def __init__(
        self,
        strategy: Coefficients,
        steps: int,
        white: Callable[[int], Tensor],
        *,
        inverse: bool = False,
        column_normalized: bool = False,
    ) -> None:
        coefficients = check_coefficients(strategy)
        self.steps = check_count("steps", steps)
        self.bands = coefficients.numel()
        if self.bands > steps:
            raise ValueError(f"{self.bands} coefficients for steps={steps}: C has one column per step. Use fewer.")
        # Also refuses coefficients of the wrong kind: those of C^-1 are not all positive.
        matrix = inverse_coefficients(coefficients, steps) if inverse else coefficients
        self.sensitivity = 1.0 if column_normalized else single_participation_sensitivity(matrix, steps)
        self._row_scale = column_norms(matrix, steps).tolist() if column_normalized else None
        self._coefficients: list[float] = coefficients.tolist()
        self._inverse = inverse
        self._white = white
        self._past: deque[Tensor] = deque(maxlen=self.bands - 1)  # x_(t-1) first
        self._next = 0
        self._kind: tuple[tuple[int, ...], torch.dtype] | None = None  # of the white noise

    def at(self, step: int) -> Tensor:
        """Return row `step` of C^-1 Z, a tensor of its own that the caller may overwrite."""
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < self.steps:
            raise ValueError(
                f"step {step!r} is outside of the run of {self.steps} steps that the sensitivity was computed for: "
                "the guarantee would not cover it. Build the noise for the whole run."
            )
        row = self._moving_average(step) if self._inverse else self._recursion(step)
        return row * (1.0 if self._row_scale is None else self._row_scale[step])

    def _moving_average(self, step: int) -> Tensor:
        total = self._checked_white(step) * self._coefficients[0]
        for lag, coefficient in enumerate(self._coefficients[1 : step + 1], start=1):
            total.add_(self._checked_white(step - lag), alpha=coefficient)
        return total

    def _recursion(self, step: int) -> Tensor:
        if step < self._next:
            self._past.clear()
            self._next = 0
        # With one band there is no past to compute.
        for current in range(step if self.bands == 1 else self._next, step + 1):
            first, *others = self._coefficients
            row = self._checked_white(current) / first
            for coefficient, past in zip(others, self._past, strict=False):
                row.sub_(past, alpha=coefficient / first)
            self._past.appendleft(row)
            self._next = current + 1
        return row

    def _checked_white(self, step: int) -> Tensor:
        white = self._white(step)
        kind = (tuple(white.shape), white.dtype)
        self._kind = self._kind or kind
        if not white.is_floating_point() or kind != self._kind:
            raise ValueError(
                f"white({step}) returned shape and dtype {kind}, the first call {self._kind}; they must be floating "
                "and the same for all steps, or the sums would not get the noise C^-1 Z that the guarantee is for."
            )
        return white


@dataclass(frozen=True)
class BandOption:
    """A number of bands: what it needs in noise, and what it makes of it."""

    bands: int
    sample_rate: float  # at which a unit of the step's group is sampled
    participations: int  # steps in which one unit can be sampled
    noise_multiplier: float
    prefix_rmse: float  # of the sums, at noise multiplier 1 and clip norm 1
    score: float  # prefix_rmse * noise_multiplier
    ratio: float  # score over that of one band, which is white noise


@dataclass(frozen=True)
class BandChoice:
    """The best number of bands, and the table it was chosen from."""

    bands: int
    noise_multiplier: float
    options: tuple[BandOption, ...]


def choose_bands(expected_batch_size: int, units: int, steps: int, calibrate: Callable[..., float]) -> BandChoice:
    """Return the number of bands with the least error of prefix sums at a privacy budget: `bands="auto"`.

    Among 1, 2, 4, ..., at most units / expected_batch_size and at most steps. More bands cancel more noise in the
    sums, but the cyclic sampler then draws from groups of units / bands, so sampling hides less and sigma grows. At
    small epsilon one band, which is DP-SGD with white noise, is usually best.

    Formal guarantee: that of `calibrate`, if it holds, for each b, for ceil(steps / b) compositions of the Gaussian
    mechanism of sensitivity 1 under Poisson sampling at rate b * expected_batch_size / units, for the group
    assignment of arXiv 2306.08153 (theorem 4): each unit is in one of b groups, chosen independently of the data, and
    step t samples from group t mod b. The choice itself reads no data.

    Args:
        expected_batch_size (`int`): B, units per step, at least 1.
        units (`int`): N, at least B.
        steps (`int`): n, at least 1.
        calibrate (`Callable[..., float]`): called as `calibrate(bands=b)`; returns the noise multiplier that spends
            the budget with b bands, finite and above 0.

    Returns:
        [`BandChoice`].

    Raises:
        ValueError: for numbers out of range or a noise multiplier that is not positive and finite.

    Example:
        >>> from hfnoise.privacy.correlated_noise import choose_bands
        >>> choice = choose_bands(256, 5000, 200, calibrate=lambda bands: 1.0 + bands / 4)
        >>> choice.bands, [f"{option.ratio:.2f}" for option in choice.options]
        (4, ['1.00', '0.86', '0.85', '0.98', '1.33'])
    """
    check_count("expected_batch_size", expected_batch_size)
    check_count("units", units, least=expected_batch_size)
    check_count("steps", steps)
    options: list[BandOption] = []
    bands = 1
    while bands <= min(units // expected_batch_size, steps):
        noise_multiplier = float(calibrate(bands=bands))
        if not 0 < noise_multiplier < math.inf:
            raise ValueError(f"calibrate(bands={bands}) returned {noise_multiplier}, which is no noise multiplier.")
        rmse = prefix_sum_error(toeplitz_strategy("banded", steps, bands), steps).rmse
        score = rmse * noise_multiplier
        options.append(
            BandOption(
                bands=bands,
                sample_rate=bands * expected_batch_size / units,
                participations=math.ceil(steps / bands),
                noise_multiplier=noise_multiplier,
                prefix_rmse=rmse,
                score=score,
                ratio=score / options[0].score if options else 1.0,
            )
        )
        bands *= 2
    best = min(options, key=lambda option: option.score)
    return BandChoice(best.bands, best.noise_multiplier, tuple(options))
