"""Laws of the number of trials K of a private hyper-parameter search (arXiv 2110.03620, definitions 1 and 5).

K must be drawn secretly and stay secret; the randomness is passed in, so that a keyed stream can supply it.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass

# A uniform number has 53 bits: what is left of the law beyond that cannot be drawn.
_LEFT_OUT = 2.0**-54
_LARGEST_LOG = 600.0  # of 1 / gamma; e^709 is the largest float


class TrialCount(ABC):
    """The law of a number of trials: `pmf(k)`, `mean` and `sample(uniform)`."""

    @property
    @abstractmethod
    def mean(self) -> float:
        """The expected number of trials E[K]."""

    @property
    @abstractmethod
    def least(self) -> int:
        """The smallest k with positive probability."""

    @abstractmethod
    def log_pmf(self, k: int) -> float:
        """Return the log of P[K = k], for k of at least `least`."""

    @abstractmethod
    def _ratio(self, k: int) -> float:
        """Return P[K = k + 1] / P[K = k]."""

    @abstractmethod
    def _last_ratio(self) -> float:
        """Return the limit of that ratio, below 1."""

    def pmf(self, k: int) -> float:
        """Return P[K = k], 0 for a k that cannot be drawn.

        Example:
            >>> from hfnoise.privacy.trial_counts import trial_count
            >>> f"{trial_count(10, eta=1.0).pmf(1):.3f}"  # geometric
            '0.100'
        """
        return math.exp(self.log_pmf(k)) if k >= self.least else 0.0

    def sample(self, uniform: float) -> int:
        """Return the K that belongs to a uniform number: the smallest k with P[K <= k] > uniform.

        The law of the result is that of K to within 1e-12 in total variation, by rounding: far below any delta.

        Args:
            uniform (`float`): in [0, 1), secret, from a cryptographic source, used for nothing else.

        Raises:
            ValueError: if it is out of range.

        Example:
            >>> from hfnoise.privacy.trial_counts import trial_count
            >>> [trial_count(10, eta=1.0).sample(u) for u in (0.0, 0.5, 0.99)]
            [1, 7, 44]
        """
        if isinstance(uniform, bool) or not isinstance(uniform, numbers.Real) or not 0 <= uniform < 1:
            raise ValueError(f"uniform must be in [0, 1), got {uniform!r}.")
        k, total, carry = self.least, 0.0, 0.0
        log_probability = self.log_pmf(k)
        while True:
            probability = math.exp(log_probability)
            # Kahan's sum: a heavy tail has a million terms, and their rounding would be seen in the law.
            term = probability - carry
            carry = (total + term) - total - term
            total += term
            if total > uniform:
                return k
            ratio = self._ratio(k)
            steepest = max(ratio, self._last_ratio())  # the tail is at most geometric with this ratio
            if steepest < 1 and probability * steepest / (1 - steepest) < _LEFT_OUT:
                return k
            log_probability += math.log(ratio) if ratio > 0 else -math.inf
            k += 1


@dataclass(frozen=True)
class TruncatedNegativeBinomial(TrialCount):
    """P[K = k] = (1 - gamma)^k / (gamma^-eta - 1) prod_(l < k) (l + eta) / (l + 1) for k of 1, 2, ...

    eta = 1 is geometric; eta = 0 logarithmic, (1 - gamma)^k / (k ln(1 / gamma)); eta near -1 has the heaviest tail and
    the smallest cost in privacy, and mostly draws K = 1: at eta = -0.5 in half of all searches, while one in a
    thousand has 40 000 trials at a mean of 200. To stop such a search early would change the law and void the bound.

    Args:
        eta (`float`): above -1.
        log_inverse_gamma (`float`): ln(1 / gamma), at least 0; 0 means K = 1. Found by [`trial_count`].

    Example:
        >>> from hfnoise.privacy.trial_counts import TruncatedNegativeBinomial
        >>> round(TruncatedNegativeBinomial(eta=1.0, log_inverse_gamma=2.302585).mean, 4)
        10.0
    """

    eta: float
    log_inverse_gamma: float

    @property
    def gamma(self) -> float:
        return math.exp(-self.log_inverse_gamma)

    @property
    def mean(self) -> float:
        """E[K] = eta (1 - gamma) / (gamma (1 - gamma^eta)); for eta = 0, (1 / gamma - 1) / ln(1 / gamma)."""
        scale = self.log_inverse_gamma
        return math.expm1(scale) / scale / _mean_of_exponential(-self.eta * scale) if scale else 1.0

    @property
    def least(self) -> int:
        return 1

    def log_pmf(self, k: int) -> float:
        scale = self.log_inverse_gamma
        if scale == 0:
            return 0.0 if k == 1 else -math.inf
        # eta / (gamma^-eta - 1), which eta = 0 does not divide by zero.
        constant = -math.log(scale) - math.log(_mean_of_exponential(self.eta * scale))
        products = math.lgamma(k + self.eta) - math.lgamma(1 + self.eta) - math.lgamma(k + 1)
        return k * math.log(-math.expm1(-scale)) + products + constant

    def _ratio(self, k: int) -> float:
        return self._last_ratio() * (k + self.eta) / (k + 1)

    def _last_ratio(self) -> float:
        return -math.expm1(-self.log_inverse_gamma)


@dataclass(frozen=True)
class PoissonCount(TrialCount):
    """P[K = k] = e^-mu mu^k / k!; K = 0 must release a default that was fixed before the search.

    Args:
        mu (`float`): above 0, the expected number of trials.

    Example:
        >>> from hfnoise.privacy.trial_counts import PoissonCount
        >>> f"{PoissonCount(10.0).pmf(0):.1e}"
        '4.5e-05'
    """

    mu: float

    @property
    def mean(self) -> float:
        return self.mu

    @property
    def least(self) -> int:
        return 0

    def log_pmf(self, k: int) -> float:
        return k * math.log(self.mu) - self.mu - math.lgamma(k + 1)

    def _ratio(self, k: int) -> float:
        return self.mu / (k + 1)

    def _last_ratio(self) -> float:
        return 0.0


def trial_count(expected_trials: float, eta: float = 0.0, distribution: str = "negative_binomial") -> TrialCount:
    """Return the law of the number of trials with a given mean.

    Args:
        expected_trials (`float`): E[K], at least 1.
        eta (`float`, defaults to 0.0): shape of the truncated negative binomial, above -1; not used by `"poisson"`.
        distribution (`str`, defaults to `"negative_binomial"`): or `"poisson"`.

    Returns:
        [`TruncatedNegativeBinomial`] or [`PoissonCount`]

    Raises:
        ValueError: for numbers out of range, and a mean that no gamma above e^-600 gives (eta close to -1).

    Example:
        >>> from hfnoise.privacy.trial_counts import trial_count
        >>> round(trial_count(50, eta=-0.5).gamma, 6)
        0.000102
    """
    for name, value, holds, allowed in (
        ("expected_trials", expected_trials, lambda number: 1 <= number < math.inf, "at least 1"),
        ("eta", eta, lambda number: -1 < number < math.inf, "above -1"),
    ):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not holds(value):
            raise ValueError(f"{name} must be a finite number, {allowed}; got {value!r}.")
    if distribution == "poisson":
        return PoissonCount(float(expected_trials))
    if distribution != "negative_binomial":
        raise ValueError(f"distribution must be 'negative_binomial' or 'poisson', got {distribution!r}.")
    low, high = 0.0, 1.0
    while TruncatedNegativeBinomial(eta, high).mean < expected_trials:
        low, high = high, 2 * high
        if high > _LARGEST_LOG:
            raise ValueError(
                f"no gamma gives expected_trials={expected_trials} at eta={eta}: the tail would be too heavy to draw "
                "from. Use a larger eta, such as -0.5."
            )
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if TruncatedNegativeBinomial(eta, middle).mean < expected_trials:
            low = middle
        else:
            high = middle
    return TruncatedNegativeBinomial(float(eta), 0.0 if expected_trials == 1 else high)


def _mean_of_exponential(x: float) -> float:
    """Return (e^x - 1) / x, 1 at 0: the mean of e^y for y between 0 and x."""
    return math.expm1(x) / x if x else 1.0
