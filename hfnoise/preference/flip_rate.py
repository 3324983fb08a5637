"""How many recorded preference labels are wrong: the flip rate, from an audit or from held-out margins.

A margin h here is signed by the recorded (noisy) label: h < 0 means that the model disagrees with it. The margins must
be held out. On pairs that the model has trained on it has learned the flips by heart, and every estimate falls to 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hfnoise.intervals import wilson_interval
from hfnoise.preference.flip_rate_likelihood import fit_flip_rate
from hfnoise.preference.pair_loss_table import check_flip_rate

METHODS = ("auto", "audit", "likelihood", "anchor")
WIDEST_HALF_WIDTH = 0.10  # a rate of 0.2 +- 0.1 still tells noisy labels from clean ones, a wider interval does not
LARGEST_RATE = 0.4  # above it the likelihood hardly tells the rate from 0.5, where the labels say nothing
# Were every flip visible, 93 pairs would be needed for a half-width of 0.10 at a rate of 0.4 (1.96^2 * 0.24 / 0.10^2).
FEWEST_PAIRS = 100
ANCHOR_SHARE = 0.1
# What stands in for a refused estimate: not 0, where no pair is suspect, and not close to 0.5, where all are.
_STAND_IN_RATES = (0.01, 0.45)
_BELOW_HALF = math.nextafter(0.5, 0.0)


@dataclass(frozen=True)
class FlipRateEstimate:
    """An estimated flip rate, how sure it is, and whether it may be used.

    Args:
        flip_rate (`float`): the estimate, in [0, 0.5).
        standard_error (`float`): from the observed information (likelihood) or binomial (audit, anchor); infinite if
            the margins do not determine the rate. At a rate of 0 the interval says more.
        interval (`tuple[float, float]`): 95 %, of the profile likelihood and inside [0, 0.5] for "likelihood"; of
            Wilson, inside [0, 1], for "audit" and "anchor".
        method (`str`): "audit", "likelihood" or "anchor".
        refused (`bool`): True when the value must not be used.
        reason (`str`): why it was refused and what to do; "" when it was not.
        scale (`float`): the calibration c that turns margins into log-odds of the clean label; 1 for audit and anchor.
        cross_check (`float`, *optional*): the anchor estimate beside a likelihood one, biased upwards; else None.
        count (`int`): how many pairs the estimate rests on.

    Example:
        >>> from hfnoise.preference import estimate_flip_rate
        >>> estimate = estimate_flip_rate(None, audit=[True] * 40 + [False] * 160)
        >>> f"{estimate.flip_rate:.2f}, from {estimate.interval[0]:.2f} to {estimate.interval[1]:.2f}"
        '0.20, from 0.15 to 0.26'
    """

    flip_rate: float
    standard_error: float
    interval: tuple[float, float]
    method: str
    refused: bool
    reason: str
    scale: float
    cross_check: float | None
    count: int

    def rate_for_posterior(self) -> float:
        """Return the rate to give to `posterior_flip`, with `scale`; of a refused estimate, a stand-in for it.

        The order of the posteriors is that of the margins at every rate, so a ranking of suspects needs no estimate;
        their level does. The stand-in is the middle of the interval, inside [0.01, 0.45].

        Example:
            >>> from hfnoise.preference import estimate_flip_rate
            >>> estimate = estimate_flip_rate(None, audit=[True] * 3 + [False] * 7)
            >>> estimate.refused, f"{estimate.rate_for_posterior():.2f}"
            (True, '0.36')
        """
        least, largest = _STAND_IN_RATES
        return min(max(sum(self.interval) / 2, least), largest) if self.refused else self.flip_rate


def estimate_flip_rate(margins: Any, method: str = "auto", audit: Any = None) -> FlipRateEstimate:
    """Return the estimated rate of flipped labels with a 95 % interval, or a refusal that says what to do.

    - "audit": k of m re-labelled pairs disagree with the record; k/m with the interval of Wilson (1927). The best.
    - "likelihood": maximum of sum log[(1 - e) sigma(c h) + e sigma(-c h)] over the rate e and a free calibration c,
      the forward-corrected likelihood (FA-DPO, arXiv 2512.00709, with one constant rate). Departures: c is free,
      because trained margins are not calibrated, and the interval also lets the calibration bend.
    - "anchor": the share of disagreement among the tenth of the pairs with the largest |h|. No model, biased upwards.

    The likelihood reads the rate off pairs about which the model is sure. Confident mistakes of the model itself look
    like flips and raise it by their share; a model that is sure of nothing gets a refusal. Multiplying all margins by
    the same positive number changes nothing but `scale`.

    Args:
        margins (`torch.Tensor`, `numpy.ndarray` or `list`): shape (pairs,), real numbers (float64 inside), finite, of
            any unit: held-out margins signed by the recorded label. Not read by "audit".
        method (`str`, defaults to `"auto"`): "auto" (audit if one is given, else likelihood) or one of the above.
        audit (the same types, *optional*): shape (audited pairs,), booleans, True where a new label disagrees with the
            recorded one.

    Returns:
        The estimate. It is refused when the half-width of the interval exceeds 0.10 (or, in an interval cut off at 0,
        the part above the estimate), when the rate exceeds 0.4, when the margins do not determine it, and (likelihood)
        below 100 pairs.

    Raises:
        ValueError: unknown method; margins or audit empty, of wrong rank or type, or not finite; an audit that is
            missing, or given to a method that does not read it.

    Example:
        >>> import torch
        >>> from hfnoise.preference import estimate_flip_rate
        >>> clean = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 2
        >>> estimate = estimate_flip_rate(torch.where(torch.arange(1000) % 5 == 0, -clean, clean))  # flip 20 %
        >>> estimate.refused, abs(estimate.flip_rate - 0.2) < 0.05
        (False, True)
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; use one of {', '.join(map(repr, METHODS))}.")
    if method == "auto":
        method = "likelihood" if audit is None else "audit"
    if method == "audit":
        return _from_audit(audit)
    if audit is not None:
        raise ValueError(f"method={method!r} does not read audit; use method='audit' or 'auto', or leave audit out.")
    values = _checked_margins(margins)
    return _from_anchor(values) if method == "anchor" else _from_likelihood(values)


def posterior_flip(
    margins: Float[Tensor, " batch"], flip_rate: float | Float[Tensor, " batch"], scale: float = 1.0
) -> Float[Tensor, " batch"]:
    """Return the probability that each label is flipped, given its margin: sigma(-c h - logit(1 - e)).

    Bayes' rule on the model of `estimate_flip_rate`; with c = 1 it is one minus the weight of forward correction.

    Args:
        margins (`torch.Tensor`): shape (batch,), signed by the recorded label; half precision is computed in float32.
        flip_rate (`float` or `torch.Tensor`): e in [0, 0.5), one number or shape (batch,). With 0 the result is 0.
        scale (`float`, defaults to `1.0`): the calibration c > 0, as estimated; 1 takes the margins for log-odds.

    Returns:
        Probabilities in [0, 1], shape (batch,), float32 or float64; never NaN for finite margins.

    Raises:
        ValueError: a flip rate outside [0, 0.5), NaN, or of another shape; a scale that is not positive and finite.

    Example:
        >>> import torch
        >>> from hfnoise.preference import posterior_flip
        >>> posterior_flip(torch.tensor([-4.0, 0.0, 4.0]), flip_rate=0.2)
        tensor([0.9317, 0.2000, 0.0046])
    """
    if not (0 < scale < math.inf):
        raise ValueError(f"scale must be positive and finite, got {scale}; use 1.0 for margins that are log-odds.")
    margins = torch.as_tensor(margins)
    margins = margins.to(torch.promote_types(margins.dtype, torch.float32))
    check_flip_rate(flip_rate, count=margins.numel())
    rates = torch.as_tensor(flip_rate, dtype=torch.float64, device=margins.device)
    logit_kept = (torch.log1p(-rates) - rates.log()).to(margins.dtype)
    # A rate of 0 is taken out, for -c h may overflow to the same infinity as its logit.
    return torch.where(rates == 0, 0.0, torch.sigmoid(-scale * margins - logit_kept))


def _from_audit(audit: Any) -> FlipRateEstimate:
    if audit is None:
        raise ValueError("method='audit' needs audit, got None; give booleans, or use method='likelihood'.")
    disagrees = _as_vector(audit, "audit", "boolean")
    allowed = (disagrees == 0) | (disagrees == 1)
    if not bool(allowed.all()):
        raise ValueError(f"audit{_first(disagrees, ~allowed)} must be a boolean: True where the new label disagrees.")
    return _binomial("audit", int(disagrees.sum()), len(disagrees), "re-label more pairs")


def _from_anchor(margins: Tensor) -> FlipRateEstimate:
    disagreements, count = _anchor(margins)
    return _binomial("anchor", disagreements, count, "give more held-out pairs, or an audit")


def _anchor(margins: Tensor) -> tuple[int, int]:
    """Count disagreements among the largest tenth of |h|; ties are all in, so that the order never matters."""
    sizes = margins.abs()
    smallest = sizes.topk(math.ceil(ANCHOR_SHARE * len(sizes))).values[-1]
    return int((margins[sizes >= smallest] < 0).sum()), int((sizes >= smallest).sum())


def _binomial(method: str, successes: int, count: int, remedy: str) -> FlipRateEstimate:
    """Return the share of successes with its Wilson interval (Wilson 1927, eq. 8)."""
    share = successes / count
    interval = wilson_interval(successes, count)
    reason = _why_refused(share, interval, count, remedy)
    standard_error = math.sqrt(share * (1 - share) / count)
    return FlipRateEstimate(
        min(share, _BELOW_HALF), standard_error, interval, method, bool(reason), reason, 1.0, None, count
    )


def _from_likelihood(margins: Tensor) -> FlipRateEstimate:
    count = len(margins)
    disagreements, anchors = _anchor(margins)
    cross_check = disagreements / anchors
    remedy = (
        "give more held-out pairs, train the model longer, or re-label some 200 pairs (audit_column of "
        "RobustDPOConfig, or estimate_flip_rate with method='audit')"
    )
    if margins.abs().min() == margins.abs().max():
        reason = f"all margins have the size {float(margins[0].abs())}, so sure and unsure pairs look alike; {remedy}."
        return FlipRateEstimate(0.0, math.inf, (0.0, 0.5), "likelihood", True, reason, 1.0, cross_check, count)
    fit = fit_flip_rate(margins)
    if count < FEWEST_PAIRS:
        reason = f"{count} pairs are too few, at least {FEWEST_PAIRS} are needed; {remedy}."
    elif int((margins < 0).sum()) * 2 > count:
        reason = f"most margins are negative; check that they are signed by the recorded label, else {remedy}."
    elif fit.interval[1] >= 0.5:
        reason = f"the labels look like coin flips at these margins (the interval reaches 0.5); {remedy}."
    else:
        reason = _why_refused(fit.flip_rate, fit.interval, count, remedy)
    rate = min(fit.flip_rate, _BELOW_HALF)
    return FlipRateEstimate(
        rate, fit.standard_error, fit.interval, "likelihood", bool(reason), reason, fit.scale, cross_check, count
    )


def _why_refused(rate: float, interval: tuple[float, float], count: int, remedy: str) -> str:
    """Return the reason against a rate and its interval, or an empty string."""
    lower, upper = interval
    # An interval that is cut off at 0 is short because it is cut: then the part above the estimate counts as well.
    half_width = max((upper - lower) / 2, upper - rate if lower == 0 else 0.0)
    if rate > LARGEST_RATE:
        # As many digits as it takes to see that it does: 0.4003, not 0.40.
        shown = next(text for digits in range(2, 18) if float(text := f"{rate:.{digits}f}") > LARGEST_RATE)
        return (
            f"the rate {shown} exceeds {LARGEST_RATE}: check the labels, or train with a loss that needs no rate "
            "(flip_rate='auto' of RobustDPOConfig)."
        )
    if half_width > WIDEST_HALF_WIDTH:
        return f"{count} pairs leave a 95 % interval from {lower:.2f} to {upper:.2f}, which is too wide; {remedy}."
    return ""


def _checked_margins(margins: Any) -> Tensor:
    values = _as_vector(margins, "margins", "number")
    finite = values.isfinite()
    if not bool(finite.all()):
        raise ValueError(f"margins{_first(values, ~finite)} is not finite; drop that pair or mend its log-probs.")
    return values


def _as_vector(values: Any, name: str, element: str) -> Tensor:
    """Return the values as a float64 vector on CPU, or raise about their type, rank or emptiness."""
    wanted = f"give a one-dimensional tensor, array or list with one {element} per pair"
    try:
        vector = torch.as_tensor(values).detach()
        if vector.is_floating_point():  # a list would have been rounded to float32
            vector = torch.as_tensor(values, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} of type {type(values).__name__} cannot be read ({error}); {wanted}.") from error
    if vector.is_complex() or (element == "number" and vector.dtype == torch.bool):
        raise ValueError(f"{name} has dtype {vector.dtype}; {wanted}.")
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; {wanted}, at least one.")
    return vector.to("cpu", torch.float64)


def _first(values: Tensor, where: Tensor) -> str:
    """Name the first value that is at fault."""
    index = int(where.nonzero()[0, 0])
    return f"[{index}] = {values[index].item()}"
