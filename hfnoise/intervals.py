"""Confidence intervals of shares."""

from __future__ import annotations

import math

CHI_SQUARED_95 = 3.841458820694124  # 95 % quantile, one degree of freedom


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """Return the interval of 95 % of a share, which stays in [0, 1] (Wilson 1927, eq. 8).

    Args:
        successes (`float`): in [0, count].
        count (`int`): at least 1.

    Example:
        >>> from hfnoise.intervals import wilson_interval
        >>> [round(end, 3) for end in wilson_interval(48, 64)]
        [0.632, 0.84]
    """
    share = successes / count
    shrunk = 1 + CHI_SQUARED_95 / count
    centre = (share + CHI_SQUARED_95 / (2 * count)) / shrunk
    half_width = math.sqrt(CHI_SQUARED_95 * (share * (1 - share) / count + CHI_SQUARED_95 / (4 * count**2))) / shrunk
    # At a share of 0 or 1 the end is exactly that, which rounding would miss by 1e-17.
    return (0.0 if successes == 0 else centre - half_width, 1.0 if successes == count else centre + half_width)
