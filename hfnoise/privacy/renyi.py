"""Rényi accounting of Poisson-sampled Gaussians: quick, always valid, up to five times too pessimistic at small rates.

Poisson sampling and the Gaussian mechanism of arXiv 1908.10530; conversion to (epsilon, delta) of arXiv 2004.00010,
proposition 12. All of it is dp-accounting's; this file keeps the curves, which composition only adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from hfnoise.privacy.dp_library import dp_accounting


class Releases(NamedTuple):
    """So many rounds of one Poisson-sampled Gaussian.

    Args:
        sampling_probability (`float`): in (0, 1], of each unit in each round.
        noise_multiplier (`float`): above 0, noise standard deviation over sensitivity.
        rounds (`int`): at least 1.
    """

    sampling_probability: float
    noise_multiplier: float
    rounds: int


def renyi_orders() -> tuple[float, ...]:
    """Return the orders of the curves: dp-accounting's own, 1.1 to 10.9 in tenths, 11 to 63, 128, 256, 512, 1024.

    Example:
        >>> from hfnoise.privacy.renyi import renyi_orders
        >>> len(renyi_orders()), renyi_orders()[0]
        (156, 1.1)
    """
    dp_accounting()
    from dp_accounting.rdp import rdp_privacy_accountant

    return tuple(float(order) for order in rdp_privacy_accountant.DEFAULT_RDP_ORDERS)


@lru_cache(maxsize=64)
def renyi_curve(
    sampling_probability: float, noise_multiplier: float, orders: tuple[float, ...] | None = None
) -> tuple[float, ...]:
    """Return the Rényi divergences of ONE round at each order; of n rounds it is n times as much.

    Formal guarantee: upper bounds of the divergence, in both directions of adding and removing one unit, of the
    Gaussian mechanism on a Poisson sample (arXiv 1908.10530, section 3.3). An order whose series fails to converge
    gets infinity, which leaves the minimum over the orders valid.

    Args:
        sampling_probability (`float`): in (0, 1].
        noise_multiplier (`float`): above 0.
        orders (`tuple[float, ...]`, *optional*): above 1; [`renyi_orders`] by default.

    Returns:
        One divergence, in nats, for each order.

    Example:
        >>> from hfnoise.privacy.renyi import renyi_curve
        >>> renyi_curve(1.0, 2.0, (2.0, 8.0))  # of the Gaussian alone: order / (2 noise_multiplier^2)
        (0.25, 1.0)
    """
    library = dp_accounting()
    accountant = library.rdp.RdpAccountant(list(renyi_orders() if orders is None else orders))
    event = library.GaussianDpEvent(noise_multiplier)
    accountant.compose(
        library.PoissonSampledDpEvent(sampling_probability, event) if sampling_probability < 1 else event
    )
    # The accountant has no public name for its curve; the tests hold it against golden vectors.
    return tuple(float(divergence) for divergence in accountant._rdp)


def renyi_epsilon(releases: Sequence[Releases], delta: float, orders: tuple[float, ...] | None = None) -> float:
    """Return the epsilon of all the releases together, by Rényi accounting; infinity if no order bounds it.

    Args:
        releases (`Sequence[Releases]`): composed; none of them gives 0.
        delta (`float`): in (0, 1).
        orders (`tuple[float, ...]`, *optional*): above 1; [`renyi_orders`] by default. Any give a valid bound.

    Example:
        >>> from hfnoise.privacy.renyi import Releases, renyi_epsilon
        >>> f"{renyi_epsilon([Releases(0.01, 1.0, 1000)], 1e-5):.3f}"
        '2.101'
    """
    if not releases:
        return 0.0
    orders = renyi_orders() if orders is None else orders
    curves = [
        [
            release.rounds * value
            for value in renyi_curve(release.sampling_probability, release.noise_multiplier, orders)
        ]
        for release in releases
    ]
    total = [sum(values) for values in zip(*curves, strict=True)]
    epsilon, _ = dp_accounting().rdp.compute_epsilon(orders, total, delta)
    return float(epsilon)
