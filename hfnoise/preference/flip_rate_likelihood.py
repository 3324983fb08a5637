"""Maximum likelihood for the rate of flipped labels, from held-out margins that carry no scale.

The model of one pair, with h the margin signed by the recorded label, e the flip rate and c a free calibration:

    P(recorded label | h) = e + (1 - 2e) sigma(c h)

so e is the level at which disagreement settles for large margins. For a fixed e the best c is found by Newton
steps, and what remains is one curve, the profile log-likelihood of e on [0, 0.5]. We walk that curve on a grid that
refines itself, instead of climbing it with L-BFGS: it may peak at the boundary e = 0 or run along a ridge towards
c = infinity, and a grid over its whole range cannot stop at the wrong one. All of it is float64.

The interval lets the calibration bend as well, sigma(sign(h) |c h|^g), with log g drawn towards 0. Trained margins are
seldom a straight multiple of the log-odds, and with g fixed at 1 the interval can then miss the rate more often than
not. The estimate itself keeps g = 1, so that the two numbers it returns, e and c, are all that a posterior needs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from hfnoise.intervals import CHI_SQUARED_95

# Standard deviation of log g. Measured on 1000 pairs, rates 0 to 0.3: 0.15 brings the coverage of bent calibrations
# (|h|^0.7, |h|^1.5, tanh) from 74-87 % to about 90 %; 0.25 gains 2 to 5 % more and refuses half as much again.
SHAPE_DEVIATION = 0.15
_GROUPS_PER_SIDE = 512  # exact below; above, neighbours in sorted order are averaged (rate moves by about 1e-4)
_COARSE_RATES = 16
_REFINEMENTS = 3
_CELL_PARTS = 6  # the last cells are (1 / 30) / 6^3 = 1.5e-4 wide, a tenth of a standard error at 100 000 pairs
_LOG_SCALE_LIMIT = 9.0  # c times the typical margin stays in e^-9 .. e^9: flat, or a step function
_LOG_SHAPE_LIMIT = 1.0
_LOGIT_LIMIT = 150.0  # sigma(-150) is 1e-65: its square is still a normal number, and denormal ones are slow
_MAXIMAL_STEPS = 60


class LikelihoodFit(NamedTuple):
    """The fitted flip rate, the calibration c in the margins' own units, and how sure both are."""

    flip_rate: float
    scale: float
    standard_error: float
    interval: tuple[float, float]


class _Sample(NamedTuple):
    sign: Float64[Tensor, " group"]
    size: Float64[Tensor, " group"]
    log_size: Float64[Tensor, " group"]
    weight: Float64[Tensor, " group"]


class _Curve(NamedTuple):
    rates: Float64[Tensor, " rate"]
    log_likelihood: Float64[Tensor, " rate"]
    parameters: Float64[Tensor, "rate 2"]  # log c and log g, the best ones at each rate

    def deviance(self) -> Float64[Tensor, " rate"]:
        return 2 * (self.log_likelihood.max() - self.log_likelihood)


def fit_flip_rate(margins: Float64[Tensor, " batch"]) -> LikelihoodFit:
    """Return the maximum-likelihood flip rate of margins that are finite and not all zero.

    Args:
        margins (`torch.Tensor`): shape (batch,), float64 on CPU, any unit, signed by the recorded label, held out.

    Returns:
        The rate in [0, 0.5], c, the standard error from the observed information (infinite when it is singular) and
        the 95 % profile-likelihood interval, with c and the shape g profiled out.

    Example:
        >>> import torch
        >>> from hfnoise.preference.flip_rate_likelihood import fit_flip_rate
        >>> margins = torch.linspace(0.1, 4, 180, dtype=torch.float64)
        >>> fit = fit_flip_rate(torch.cat([margins, -margins[::9]]))  # 20 of 200 disagree, as often at every size
        >>> f"{fit.flip_rate:.2f}, from {fit.interval[0]:.2f} to {fit.interval[1]:.2f}"
        '0.10, from 0.06 to 0.14'
    """
    # The median is robust to heavy tails, and taken over non-zero sizes because a zero margin carries no information.
    # The clamp keeps c finite: it is at most e^9 / typical.
    typical = margins.abs()[margins != 0].median().clamp(min=1e-300)
    sample = _group(margins / typical)
    coarse = _coarse_curve(sample)
    straight = _refine(sample, coarse, 0.0, level=0.0)
    flip_rate = _peak(straight)
    best = straight.log_likelihood.argmax()
    peak = _fit_at(sample, torch.tensor([flip_rate], dtype=torch.float64), straight.parameters[best][None], 0.0)
    log_scale = float(peak.parameters[0, 0])
    bent = _fit_at(sample, coarse.rates, coarse.parameters, SHAPE_DEVIATION)
    lower, upper = _interval(_refine(sample, bent, SHAPE_DEVIATION, level=CHI_SQUARED_95))
    return LikelihoodFit(
        flip_rate=flip_rate,
        scale=math.exp(log_scale) / float(typical),
        standard_error=_standard_error(sample, flip_rate, log_scale),
        interval=(min(lower, flip_rate), max(upper, flip_rate)),
    )


def _group(margins: Float64[Tensor, " batch"]) -> _Sample:
    """Merge neighbours in sorted order, each side of zero by itself: the cost stops growing with the sample."""
    values, weights = [], []
    for side in (margins[margins >= 0], margins[margins < 0]):
        for_group = torch.arange(len(side)) * min(len(side), _GROUPS_PER_SIDE) // max(len(side), 1)
        weight = torch.bincount(for_group).double()
        values.append(torch.zeros_like(weight).index_add_(0, for_group, side.sort().values) / weight)
        weights.append(weight)
    value = torch.cat(values)
    size = value.abs().clamp(min=1e-300)  # keeps the logarithm of a zero finite; its sign 0 takes it out of all terms
    return _Sample(value.sign(), size, size.log(), torch.cat(weights))


def _coarse_curve(sample: _Sample) -> _Curve:
    """Fit c at every coarse rate, each from the best of a ladder of starts that spans all scales."""
    rates = torch.linspace(0, 0.5, _COARSE_RATES, dtype=torch.float64)
    start = torch.zeros(_COARSE_RATES, 2, dtype=torch.float64)
    best = torch.full_like(rates, -math.inf)
    for rung in torch.linspace(-_LOG_SCALE_LIMIT, _LOG_SCALE_LIMIT, 19).tolist():
        agreement = torch.sigmoid((sample.sign * sample.size * math.exp(rung)).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT))
        likelihood = rates[:, None] + (1 - 2 * rates[:, None]) * agreement
        value = torch.xlogy(sample.weight, likelihood).sum(1)
        start[value > best, 0] = rung
        best = torch.maximum(best, value)
    return _fit_at(sample, rates, start, shape_deviation=0.0)


def _refine(sample: _Sample, curve: _Curve, shape_deviation: float, level: float) -> _Curve:
    """Split the cells of the curve that touch its peak or where its deviance crosses the level, a few times."""
    parts = torch.arange(1, _CELL_PARTS, dtype=torch.float64) / _CELL_PARTS
    for _ in range(_REFINEMENTS):
        deviance = curve.deviance()
        inside = deviance <= level
        split = inside[1:] != inside[:-1]
        peak = int(deviance.argmin())
        split[max(peak - 1, 0) : peak + 1] = True
        cells = split.nonzero()[:, 0]
        left, right = curve.rates[cells], curve.rates[cells + 1]
        rates = (left[:, None] + (right - left)[:, None] * parts).flatten()
        nearer_peak = torch.where(deviance[cells] <= deviance[cells + 1], cells, cells + 1)
        start = curve.parameters[nearer_peak].repeat_interleave(len(parts), dim=0)
        joined = _Curve(*map(torch.cat, zip(curve, _fit_at(sample, rates, start, shape_deviation), strict=True)))
        order = joined.rates.argsort()
        curve = _Curve(*(column[order] for column in joined))
    return curve


def _fit_at(
    sample: _Sample, rates: Float64[Tensor, " rate"], start: Float64[Tensor, "rate 2"], shape_deviation: float
) -> _Curve:
    """Fit log c (and log g, where it may move) at every given rate at once by damped Newton steps."""
    limit = torch.tensor([_LOG_SCALE_LIMIT, _LOG_SHAPE_LIMIT], dtype=torch.float64)
    current = start
    value, step, damping = torch.full_like(rates, -math.inf), torch.zeros_like(start), torch.zeros_like(rates)
    for _ in range(_MAXIMAL_STEPS):
        candidate = (current + step / (1 + damping[:, None])).clamp(-limit, limit)
        tried_value, tried_step = _newton(sample, rates, candidate, shape_deviation)
        gained = tried_value - value
        better = gained >= 0
        value = torch.where(better, tried_value, value)
        current = torch.where(better[:, None], candidate, current)
        step = torch.where(better[:, None], tried_step, step)
        damping = torch.where(better, 0.0, damping * 3 + 1)
        if bool((gained.abs() < 1e-7).all()):  # the next Newton step would gain the square of that
            break
    return _Curve(rates, value, current)


def _newton(
    sample: _Sample, rates: Float64[Tensor, " rate"], parameters: Float64[Tensor, "rate 2"], shape_deviation: float
) -> tuple[Float64[Tensor, " rate"], Float64[Tensor, "rate 2"]]:
    """Return sum w log[e + (1 - 2e) sigma(z)] less the penalty on log g, and its Newton step in (log c, log g).

    z = sign(h) |c h|^g and t = log |z|, so that dz/dlog c = g z and dz/dlog g = t z.
    """
    log_scale, shape = parameters[:, :1], parameters[:, 1:].exp()
    rate = rates[:, None]
    log_logit = (shape * (log_scale + sample.log_size)).clamp(max=math.log(_LOGIT_LIMIT))
    # exp2 and xlogy, not exp and log: on CPU those open a thread team per call, 5 ms each when the cores are busy
    logit = sample.sign * torch.exp2(log_logit / math.log(2))
    agreement = torch.sigmoid(logit)
    likelihood = rate + (1 - 2 * rate) * agreement
    value = torch.xlogy(sample.weight, likelihood).sum(1)
    relative_slope = (1 - 2 * rate) * agreement * (1 - agreement) / likelihood
    pull = sample.weight * logit * relative_slope
    bend = pull * (logit * (relative_slope - 1 + 2 * agreement) - 1)
    g = shape[:, 0]
    by_scale, curve_scale = g * pull.sum(1), g.square() * bend.sum(1)
    if shape_deviation == 0:  # log g is fixed
        by_shape, mixed, curve_shape = torch.zeros_like(g), torch.zeros_like(g), torch.ones_like(g)
    else:
        precision, log_shape = shape_deviation**-2, parameters[:, 1]
        pull_t, bend_t = pull * log_logit, bend * log_logit
        value = value - precision * log_shape.square() / 2
        by_shape = pull_t.sum(1) - precision * log_shape
        mixed = g * (bend_t - pull).sum(1)
        curve_shape = (bend_t * log_logit - pull_t).sum(1) + precision
    determinant = curve_scale * curve_shape - mixed.square()
    concave = (curve_scale > 0) & (determinant > 1e-3 * (curve_scale * curve_shape).abs())
    # Where the surface is not concave, climb each direction by itself, with the size of its curvature.
    mixed = torch.where(concave, mixed, 0.0)
    curve_scale, curve_shape = curve_scale.abs() + 1e-9, curve_shape.abs() + 1e-9
    determinant = curve_scale * curve_shape - mixed.square()
    step = torch.stack([curve_shape * by_scale - mixed * by_shape, curve_scale * by_shape - mixed * by_scale], dim=1)
    return value, (step / determinant[:, None]).clamp(-1, 1)


def _peak(curve: _Curve) -> float:
    """Return the rate at the top of the curve: of the parabola through the three best points, or the boundary."""
    best = int(curve.log_likelihood.argmax())
    if best in (0, len(curve.rates) - 1):
        return float(curve.rates[best])
    left, middle, right = curve.rates[best - 1 : best + 2].tolist()
    at_left, at_middle, at_right = curve.log_likelihood[best - 1 : best + 2].tolist()
    rise, fall = (at_middle - at_left) / (middle - left), (at_right - at_middle) / (right - middle)
    if rise <= fall:  # a flat top, to rounding
        return float(middle)
    # the slope is rise in the middle of the left cell and fall in the middle of the right one
    return float(left + middle + (right - left) * rise / (rise - fall)) / 2


def _interval(curve: _Curve) -> tuple[float, float]:
    """Return where the deviance leaves the 95 % line on both sides, or the end of [0, 0.5] where it does not."""
    root = curve.deviance().sqrt()  # nearly straight in the rate
    limit = math.sqrt(CHI_SQUARED_95)
    inside = (root <= limit).nonzero()[:, 0].tolist()
    ends = []
    for index, outer in ((inside[0], inside[0] - 1), (inside[-1], inside[-1] + 1)):
        end = float(curve.rates[index])
        if 0 <= outer < len(root):
            end += float((curve.rates[outer] - end) * (limit - root[index]) / (root[outer] - root[index]))
        ends.append(end)
    return ends[0], ends[1]


def _standard_error(sample: _Sample, flip_rate: float, log_scale: float) -> float:
    """Return the standard error of the rate from the observed information of (rate, log c)."""
    logit = (math.exp(log_scale) * sample.size).clamp(max=_LOGIT_LIMIT) * sample.sign
    agreement = torch.sigmoid(logit)
    likelihood = flip_rate + (1 - 2 * flip_rate) * agreement
    slope = agreement * (1 - agreement) * logit / likelihood
    by_scale = (1 - 2 * flip_rate) * slope
    by_rate = (1 - 2 * agreement) / likelihood
    of_rate = float((sample.weight * by_rate.square()).sum())
    mixed = float((sample.weight * (by_rate * by_scale + 2 * slope)).sum())
    of_scale = float((sample.weight * by_scale * (by_scale - 1 - (1 - 2 * agreement) * logit)).sum())
    # For margins that separate the labels c runs to its limit and says nothing more: its row drops out.
    shared = mixed * mixed / of_scale if of_scale > 1e-6 * float(sample.weight.sum()) else 0.0
    return 1 / math.sqrt(of_rate - shared) if of_rate > shared else math.inf
