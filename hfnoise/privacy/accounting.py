"""What a private run has released, and the epsilon of it: of one run, or of several on the same data.

Everything here is for adding or removing one unit (a row, a pair or all rows of a user). Replacing a unit is removing
one and adding another: the sensitivity is twice as large, and no number of this file holds for it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from hfnoise.privacy.dp_library import dp_accounting
from hfnoise.privacy.loss_distribution import FINEST_INTERVAL, loss_distribution_epsilon
from hfnoise.privacy.renyi import Releases, renyi_epsilon

ACCOUNTANTS = ("pld", "rdp")
# Rates are quotients of integers: a product with the bands that differs from 1 by rounding alone is 1.
_RATE_ROUNDING = 1e-9


@dataclass(frozen=True)
class Mechanism:
    """What one private run has released: noisy sums of clipped gradients, each over a secret random batch.

    With one band every step draws each unit independently with probability `sample_rate` and adds noise of its own:
    `steps` Poisson-sampled Gaussians. With b > 1 bands (BandMF with cyclic sampling, arXiv 2306.08153, theorem 4) the
    units are split into b groups once, step t draws from group t mod b with probability b * `sample_rate`, and the
    noise of neighbouring steps is correlated through a strategy of b bands; a unit can then count once in b steps, and
    the release is that of ceil(steps / b) Poisson-sampled Gaussians with that larger probability.

    Args:
        sample_rate (`float`): expected batch over number of units, in (0, 1], whatever the number of bands.
        noise_multiplier (`float`): at least 0: standard deviation of the noise over the sensitivity, which is the
            clipping bound, also with bands, since the columns of the strategy are normalised.
        steps (`int`): at least 0.
        bands (`int`, defaults to 1): at least 1, and at most 1 / `sample_rate`.

    Raises:
        TypeError, ValueError: for what cannot be accounted for.

    Example:
        >>> from hfnoise.privacy.accounting import Mechanism
        >>> banded = Mechanism(sample_rate=0.01, noise_multiplier=1.0, steps=1000, bands=8)
        >>> banded.rounds, banded.sampling_probability
        (125, 0.08)
    """

    sample_rate: float
    noise_multiplier: float
    steps: int
    bands: int = 1

    def __post_init__(self) -> None:
        _check_rate(self.sample_rate)
        _real("noise_multiplier", self.noise_multiplier, "at least 0 and finite", lambda value: value >= 0)
        _integer("steps", self.steps, 0)
        _integer("bands", self.bands, 1)
        if self.sample_rate * self.bands > 1 + _RATE_ROUNDING:
            raise ValueError(
                f"bands={self.bands} split the units into groups smaller than the expected batch (sample_rate * bands "
                f"= {self.sample_rate * self.bands:g} > 1): no group can be sampled as the accounting assumes; use at "
                f"most {math.floor(1 / self.sample_rate + _RATE_ROUNDING)} bands, or a smaller batch."
            )

    @property
    def rounds(self) -> int:
        """How often one unit can have been drawn: ceil(steps / bands)."""
        return -(-self.steps // self.bands)

    @property
    def sampling_probability(self) -> float:
        """The probability that a unit is drawn in one of those rounds: sample_rate * bands."""
        probability = float(self.sample_rate * self.bands)
        return 1.0 if self.bands > 1 and probability > 1 - _RATE_ROUNDING else probability

    @property
    def event(self) -> Any:
        """The `DpEvent` of dp-accounting, for an accountant of your own."""
        library = dp_accounting()
        event = library.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_probability < 1:
            event = library.PoissonSampledDpEvent(self.sampling_probability, event)
        return library.SelfComposedDpEvent(event, self.rounds) if self.rounds else library.NoOpDpEvent()


@dataclass(frozen=True)
class Search:
    """A private hyper-parameter search: a secret random number of runs, of which only the best is released.

    See [`~hfnoise.privacy.tuning.tuned_epsilon`] for the conditions.

    Args:
        mechanism ([`Mechanism`]): of every run, or one that is no more private.
        expected_trials (`float`): mean of the number of runs, at least 1.
        eta (`float`, defaults to 0.0): of the truncated negative binomial, above -1.
        distribution (`str`, defaults to `"negative_binomial"`): or `"poisson"`.

    Raises:
        TypeError, ValueError: for what cannot be accounted for.

    Example:
        >>> from hfnoise.privacy.accounting import Mechanism, Search
        >>> f"{Search(Mechanism(1.0, 2.0, steps=1), expected_trials=10, eta=-0.5).epsilon(1e-5):.2f}"
        '3.21'
    """

    mechanism: Mechanism
    expected_trials: float
    eta: float = 0.0
    distribution: str = "negative_binomial"

    def __post_init__(self) -> None:
        from hfnoise.privacy.trial_counts import trial_count

        if not isinstance(self.mechanism, Mechanism):
            raise TypeError(f"a search is over runs of a Mechanism, got {type(self.mechanism).__name__}.")
        trial_count(self.expected_trials, self.eta, self.distribution)  # refuses what is no law

    def epsilon(self, delta: float) -> float:
        """Return the epsilon of the whole search."""
        from hfnoise.privacy.tuning import tuned_epsilon

        one = self.mechanism
        if not one.rounds:
            return 0.0
        if one.noise_multiplier == 0:
            return math.inf
        return tuned_epsilon(
            one.noise_multiplier, one.sample_rate, one.steps, delta, self.expected_trials, self.eta, self.distribution,
            bands=one.bands,
        )  # fmt: skip


def compute_epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str = "pld"
) -> float:
    """Return the epsilon of `steps` steps of DP-SGD with Poisson sampling, for adding or removing one unit.

    Formal guarantee: what the run has released is (epsilon, delta)-differentially private if every step drew each unit
    independently with probability `sample_rate`, clipped each unit's contribution to norm C, and added Gaussian noise
    of standard deviation `noise_multiplier` * C to each coordinate of their sum (arXiv 1607.00133), and if the number
    of steps was not chosen by looking at what was released. Not covered: batches of a fixed size, shuffling, and
    whatever else was published (losses, choice of hyper-parameters).

    Args:
        noise_multiplier (`float`): at least 0; 0 gives infinity.
        sample_rate (`float`): expected batch over number of units, in (0, 1].
        steps (`int`): at least 0; 0 gives 0.
        delta (`float`): in (0, 1).
        accountant (`str`, defaults to `"pld"`): "pld" (privacy loss distributions, tight) or "rdp" (Rényi, up to five
            times larger at small sample rates).

    Returns:
        `float`: epsilon, in nats; infinity where nothing is guaranteed.

    Raises:
        TypeError, ValueError: for bad arguments, and for a `delta` that is lost in rounding.
        ImportError: without dp-accounting.

    Example:
        >>> from hfnoise.privacy.accounting import compute_epsilon
        >>> f"{compute_epsilon(noise_multiplier=3.0, sample_rate=0.05, steps=300, delta=1e-5):.3f}"
        '1.159'
    """
    return composed_epsilon([Mechanism(sample_rate, noise_multiplier, steps)], delta, accountant)


def composed_epsilon(mechanisms: Iterable[Mechanism | Search], delta: float, accountant: str = "pld") -> float:
    """Return the epsilon of several runs on the same units, together: each may depend on what the others released.

    Formal guarantee: adaptive composition of the mechanisms under adding or removing one unit. The rates and noise of
    a run must not have been chosen by looking at the data otherwise than through the releases counted here. Searches
    are added by basic composition, see [`split_searches`].

    Args:
        mechanisms (`Iterable[Mechanism | Search]`): in any order; none gives 0.
        delta (`float`): in (0, 1), for all of them together.
        accountant (`str`, defaults to `"pld"`): as for [`compute_epsilon`].

    Raises:
        TypeError, ValueError, ImportError: as [`compute_epsilon`].

    Example:
        >>> from hfnoise.privacy.accounting import Mechanism, composed_epsilon
        >>> runs = [Mechanism(0.05, 3.0, 300), Mechanism(1.0, 10.0, 1)]
        >>> f"{composed_epsilon(runs, 1e-5):.3f}"
        '1.224'
    """
    check_delta(delta)
    check_accountant(accountant)
    epsilon, delta, runs = split_searches(mechanisms, delta)
    rounds: dict[tuple[float, float], int] = {}
    for mechanism in runs:
        if mechanism.rounds:
            kind = (mechanism.sampling_probability, float(mechanism.noise_multiplier))
            rounds[kind] = rounds.get(kind, 0) + mechanism.rounds
    if any(noise == 0 for _, noise in rounds):
        return math.inf
    if not rounds:
        return epsilon
    releases = tuple(Releases(*kind, count) for kind, count in rounds.items())
    return epsilon + _epsilon(releases, float(delta), accountant)


def split_searches(
    mechanisms: Iterable[Mechanism | Search], delta: float, and_runs: bool = False
) -> tuple[float, float, list[Mechanism]]:
    """Return the epsilon of the searches among mechanisms, the delta that is left for the others, and those.

    A search has a Rényi bound and no privacy loss distribution, so it is added by basic composition: each of n
    searches is taken at delta / (2 n), and delta / 2 is left. Without other runs each is taken at delta / n.

    Args:
        mechanisms (`Iterable[Mechanism | Search]`): in any order.
        delta (`float`): of everything together.
        and_runs (`bool`, defaults to `False`): leave delta / 2 for runs that are still to come.

    Raises:
        TypeError: if something else is among them.

    Example:
        >>> from hfnoise.privacy.accounting import Mechanism, split_searches
        >>> split_searches([Mechanism(1.0, 10.0, 1)], 1e-5)
        (0.0, 1e-05, [Mechanism(sample_rate=1.0, noise_multiplier=10.0, steps=1, bands=1)])
    """
    runs: list[Mechanism] = []
    searches: list[Search] = []
    for mechanism in mechanisms:
        if isinstance(mechanism, Search):
            searches.append(mechanism)
        elif isinstance(mechanism, Mechanism):
            runs.append(mechanism)
        else:
            raise TypeError(f"mechanisms holds a {type(mechanism).__name__}; give instances of Mechanism or Search.")
    if not searches:
        return 0.0, delta, runs
    left = delta / 2 if and_runs or any(run.rounds for run in runs) else 0.0
    each = (delta - left) / len(searches)
    return math.fsum(_search_epsilon(search, each) for search in searches), left or delta, runs


@lru_cache(maxsize=1024)
def _search_epsilon(search: Search, delta: float) -> float:
    return search.epsilon(delta)


# Repeated questions (a trainer's log, the report) cost nothing.
@lru_cache(maxsize=1024)
def _epsilon(releases: tuple[Releases, ...], delta: float, accountant: str) -> float:
    return (loss_distribution_epsilon if accountant == "pld" else renyi_epsilon)(releases, delta)


def accountant_description(accountant: str = "pld") -> str:
    """Return one line for reports: library and version, method, grid or orders, and what neighbouring data are.

    Example:
        >>> from hfnoise.privacy.accounting import accountant_description
        >>> accountant_description("pld")
        'dp-accounting ..., privacy loss distributions (Connect the Dots, pessimistic, grid 0.0001 ...'
    """
    check_accountant(accountant)
    dp_accounting()
    if accountant == "pld":
        method = (
            f"privacy loss distributions (Connect the Dots, pessimistic, grid {FINEST_INTERVAL:g} of epsilon, wider "
            "where epsilon exceeds 10 or the noise multiplier is below about 0.3)"
        )
    else:
        method = "Rényi differential privacy (orders 1.1 to 1024)"
    return f"dp-accounting {version('dp-accounting')}, {method}; neighbouring data differ by one unit added or removed"


def check_delta(delta: float, name: str = "delta") -> None:
    """Raise ValueError or TypeError unless `delta` is a number in (0, 1).

    Example:
        >>> from hfnoise.privacy.accounting import check_delta
        >>> check_delta(1e-5)
    """
    _real(name, delta, "in (0, 1), well below 1 / number of units", lambda value: 0 < value < 1)


def check_accountant(accountant: str) -> None:
    """Raise ValueError unless `accountant` names one of `ACCOUNTANTS`.

    Example:
        >>> from hfnoise.privacy.accounting import check_accountant
        >>> check_accountant("rdp")
    """
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant={accountant!r} is unknown; use one of {', '.join(map(repr, ACCOUNTANTS))}.")


def _check_rate(rate: Any) -> None:
    text = "in (0, 1]: the expected batch over the number of units"
    _real("sample_rate", rate, text, lambda value: 0 < value <= 1)


def _real(name: str, value: Any, allowed: str, holds: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number {allowed}.")
    if not (math.isfinite(value) and holds(value)):
        raise ValueError(f"{name}={value!r} has no meaning for the accountant; it must be {allowed}.")


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give an integer of at least {least}.")
    if value < least:
        raise ValueError(f"{name}={value!r} has no meaning for the accountant; it must be at least {least}.")
