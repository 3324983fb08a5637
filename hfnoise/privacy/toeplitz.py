"""Lower-triangular Toeplitz strategies C for correlated noise, and the error of prefix sums under them.

Training releases the noisy gradients g_t + clip_norm * sigma * (C^-1 Z)_t, Z white. What the optimiser uses are their
prefix sums, A g with A the lower-triangular matrix of ones; their error is (A C^-1) Z. C is held as its first column
c: C[t, s] = c[t - s], zero for t < s. Everything is float64. Notation of arXiv 2306.08153 (A = B C).
"""

from __future__ import annotations

import math
import numbers
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

if TYPE_CHECKING:
    from numpy import ndarray as Array
else:
    Array = Any

Coefficients = Float64[Tensor, " bands"]

STRATEGY_KINDS = ("sqrt", "nu", "banded", "banded_inverse_sqrt")
_OPTIMISER_STEPS = 250  # as jax_privacy's optimize_banded_toeplitz
_OPTIMISER_MEMORY = 20
_REFUSED = 1e100  # a loss; white noise, the worst that is of use, has (steps + 1) / 2


def toeplitz_strategy(kind: str, steps: int, bands: int | None = None, *, nu: float | None = None) -> Coefficients:
    """Return the Toeplitz coefficients of a strategy C, or of C^-1 for `"banded_inverse_sqrt"`.

    - `"sqrt"`: coefficients of 1 / sqrt(1 - x), c_t = c_(t-1) (2t - 1) / (2t), c_0 = 1; C C = A. Of all Toeplitz
      strategies it has the least maximal error with one participation (arXiv 2404.16706). Not normalised. With
      `bands`, cut off after as many.
    - `"nu"`: the same times (1 - nu)^t (nu-DP-FTRL, arXiv 2310.06771), for strongly convex losses; not normalised.
    - `"banded"`: the `bands` coefficients of unit norm with the least mean squared error of prefix sums, by L-BFGS
      with exact gradients from the truncated square root (arXiv 2405.15913). Used with the cyclic sampler of BandMF
      (arXiv 2306.08153). Cached per process.
    - `"banded_inverse_sqrt"`: the first `bands` coefficients of sqrt(1 - x), which are those of **C^-1**, not of C
      (BISR, arXiv 2505.12128). The sensitivity is that of `inverse_coefficients(result, steps)`.

    Args:
        kind (`str`): one of the four above.
        steps (`int`): optimiser steps n that the prefix sums run over, at least 1.
        bands (`int`, *optional*): number of coefficients, in [1, steps]. Needed by the banded kinds; the others
            default to `steps`.
        nu (`float`, *optional*): decay of `"nu"`, in [0, 1); the paper's tuned values are about the learning rate
            times the smallest curvature. Only for `"nu"`.

    Returns:
        `torch.Tensor` of shape `(bands,)`, float64, on the CPU; a fresh one at every call.

    Raises:
        ValueError: for an unknown kind, numbers out of range, or `nu` where it means nothing.

    Example:
        >>> from hfnoise.privacy.toeplitz import toeplitz_strategy
        >>> toeplitz_strategy("sqrt", 4).tolist()
        [1.0, 0.5, 0.375, 0.3125]
        >>> toeplitz_strategy("banded_inverse_sqrt", 100, 3).tolist()
        [1.0, -0.5, -0.125]
        >>> round(toeplitz_strategy("banded", 100, 8).norm().item(), 12)
        1.0
    """
    if kind not in STRATEGY_KINDS:
        raise ValueError(f"kind must be one of {', '.join(STRATEGY_KINDS)}; got {kind!r}.")
    check_count("steps", steps)
    if bands is None:
        if kind.startswith("banded"):
            raise ValueError(f"kind={kind!r} needs bands, the number of coefficients, between 1 and steps={steps}.")
        bands = steps
    check_count("bands", bands)
    if bands > steps:
        raise ValueError(f"bands={bands} exceeds steps={steps}: C has one column per step. Use at most {steps} bands.")
    if (nu is not None) != (kind == "nu"):
        raise ValueError(f"nu belongs to kind='nu' and only to it; got kind={kind!r}, nu={nu}.")
    if nu is not None and (isinstance(nu, bool) or not 0 <= nu < 1):
        raise ValueError(f"nu must be in [0, 1), got {nu!r}.")
    if kind == "banded":
        return torch.tensor(_optimised_banded(steps, bands), dtype=torch.float64)
    strategy = _square_root(bands)
    if kind == "banded_inverse_sqrt":
        # sqrt(1 - x) = (1 - x) / sqrt(1 - x)
        return torch.cat([strategy[:1], strategy[1:] - strategy[:-1]])
    return strategy if nu is None else strategy * (1 - nu) ** torch.arange(bands, dtype=torch.float64)


def inverse_coefficients(coefficients: Coefficients, steps: int) -> Float64[Tensor, " steps"]:
    """Return the first `steps` Toeplitz coefficients of the inverse of a lower-triangular Toeplitz matrix.

    Args:
        coefficients (`torch.Tensor` of shape `(bands,)`, floating): first column of C (or of C^-1), from the diagonal
            on; the first is not 0, what is beyond `bands` is 0.
        steps (`int`): size of the matrix, at least 1.

    Returns:
        `torch.Tensor` of shape `(steps,)`, float64.

    Raises:
        ValueError: if the coefficients are no finite vector with a first entry that is not 0.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.toeplitz import inverse_coefficients
        >>> inverse_coefficients(torch.tensor([2.0, 1.0]), 3).tolist()
        [0.5, -0.25, 0.125]
    """
    impulse = torch.zeros(check_count("steps", steps), dtype=torch.float64)
    impulse[0] = 1
    return solve_toeplitz(coefficients, impulse)


def solve_toeplitz(coefficients: Coefficients, right: Float64[Tensor, " steps"]) -> Float64[Tensor, " steps"]:
    """Return C^-1 applied to a vector, by the recursion x_t = (r_t - sum_j c_j x_(t-j)) / c_0: O(steps * bands).

    Example:
        >>> import torch
        >>> from hfnoise.privacy.toeplitz import solve_toeplitz
        >>> solve_toeplitz(torch.tensor([2.0, 1.0]), torch.ones(3)).tolist()
        [0.5, 0.25, 0.375]
    """
    from scipy.signal import lfilter

    coefficients = check_coefficients(coefficients)
    solution = lfilter([1.0], coefficients.numpy(), right.detach().double().cpu().numpy())
    return torch.from_numpy(solution)


class PrefixSumError(NamedTuple):
    """Expected squared errors of noisy prefix sums, for noise of variance 1 before C^-1 and sensitivity as it is.

    `squared_error[t]` is that of the sum of the first t + 1 gradients; `mean` and `maximum` are over t, `rmse` is the
    root of the mean. Times the squared sensitivity of C it is the loss by which strategies are compared.
    """

    squared_error: Float64[Tensor, " steps"]
    mean: float
    maximum: float
    rmse: float


def prefix_sum_error(coefficients: Coefficients, steps: int) -> PrefixSumError:
    """Return the error of the prefix sums of noise C^-1 Z: entry t is the sum of the first t + 1 squares of C^-1 1.

    Args:
        coefficients (`torch.Tensor` of shape `(bands,)`, floating): of C.
        steps (`int`): number n of prefix sums, at least 1.

    Returns:
        [`PrefixSumError`]. White noise, C = 1, has squared errors 1, 2, ..., n.

    Raises:
        ValueError: as [`inverse_coefficients`].

    Example:
        >>> import torch
        >>> from hfnoise.privacy.toeplitz import prefix_sum_error, toeplitz_strategy
        >>> prefix_sum_error(torch.ones(1), 200).mean
        100.5
        >>> round(prefix_sum_error(toeplitz_strategy("banded", 200, 8), 200).mean, 1)
        16.8
    """
    check_count("steps", steps)
    squared = solve_toeplitz(coefficients, torch.ones(steps, dtype=torch.float64)).square().cumsum(0)
    mean = squared.mean().item()
    return PrefixSumError(squared, mean, squared[-1].item(), math.sqrt(mean))


def check_coefficients(coefficients: Tensor) -> Coefficients:
    """Return the coefficients in float64 on the CPU, or raise ValueError if they define no invertible C."""
    if not isinstance(coefficients, Tensor) or coefficients.dim() != 1 or coefficients.numel() == 0:
        raise ValueError(
            "coefficients must be a tensor of shape (bands,), the first column of a lower-triangular Toeplitz matrix, "
            f"as toeplitz_strategy returns it; got {type(coefficients).__name__} of shape "
            f"{tuple(getattr(coefficients, 'shape', ()))}."
        )
    coefficients = coefficients.detach().double().cpu()
    if not coefficients.isfinite().all() or coefficients[0] == 0:
        raise ValueError(
            f"coefficients must be finite, with a first one other than 0, got {coefficients[:4].tolist()}...: "
            "C has no inverse, so there is no noise C^-1 Z and no guarantee."
        )
    return coefficients


def check_count(name: str, value: int, least: int = 1) -> int:
    """Return a whole number of at least `least`, or raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return int(value)


def _square_root(count: int) -> Coefficients:
    """Return the first coefficients of 1 / sqrt(1 - x)."""
    index = torch.arange(1, count, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - 0.5 / index).cumprod(0)])


@lru_cache(maxsize=256)
def _optimised_banded(steps: int, bands: int) -> tuple[float, ...]:
    """Minimise |c|^2 * mean squared error of prefix sums over c_1, ..., c_(bands-1) with c_0 = 1; then normalise.

    The loss does not change with the scale of c, so c_0 is held fixed: one flat direction less for the optimiser. And
    it is the log of the loss that is minimised: L-BFGS's first step is as long as the gradient, which grows with
    steps, and would leave the region where C^-1 is stable.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.signal import lfilter

    if bands == 1:
        return (1.0,)
    ones = np.ones(steps)
    # The mean over t of the sum of b_s^2 for s <= t weighs b_s^2 by the share of prefix sums it enters.
    weights = 1 - np.arange(steps) / steps

    def log_loss_and_gradient(tail: Array) -> tuple[float, Array]:
        strategy = np.concatenate(([1.0], tail))
        # A trial step may leave the region where C^-1 is stable; its error then overflows, and the step is refused.
        with np.errstate(over="ignore", invalid="ignore"):
            error = lfilter([1.0], strategy, ones)  # b = C^-1 1
            weighted = weights * error
            mean, norm = float(weighted @ error), float(strategy @ strategy)
            if not mean < _REFUSED:
                return math.log(_REFUSED), np.zeros_like(tail)
            # C b = 1, so db = -C^-1 (dC) b; the adjoint solve with C^T is the same filter, run backwards.
            adjoint = lfilter([1.0], strategy, 2 * weighted[::-1])[::-1]
            slope = np.array([-(adjoint[j:] @ error[: steps - j]) for j in range(1, bands)])
        return math.log(mean * norm), slope / mean + 2 * tail / norm

    start = _square_root(bands).numpy()[1:]
    best = minimize(
        log_loss_and_gradient,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": _OPTIMISER_STEPS, "maxcor": _OPTIMISER_MEMORY, "ftol": 1e-12, "gtol": 1e-8},
    )
    if best.fun > log_loss_and_gradient(start)[0] or not np.isfinite(best.x).all():
        raise RuntimeError(f"optimising a banded strategy for steps={steps}, bands={bands} diverged: {best.message}.")
    strategy = np.concatenate(([1.0], best.x))
    return tuple((strategy / np.linalg.norm(strategy)).tolist())
