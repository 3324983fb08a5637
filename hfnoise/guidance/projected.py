"""Adaptive projected guidance: strong guidance without saturated images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hfnoise.guidance.denoising_point import DenoisingPoint
from hfnoise.guidance.number_check import check_number
from hfnoise.guidance.tensor_math import check_pair, inner, norm, sample_dims, widened

# Nearer to the end of a run than this a change of the output no longer changes x0, and dividing by it is only noise.
_LEAST_SCALE = 1e-6


class MomentumState:
    """The running update of APG, m <- delta + momentum m, which starts at 0; one per run.

    Args:
        momentum (`float`): beta in (-1, 1); the paper's are negative, -0.75 and -0.5: they push away from what earlier
            steps added already. 0 is none.

    Raises:
        TypeError: if momentum is no number.
        ValueError: if it is not in (-1, 1), where the sum over steps would not converge.

    Example:
        >>> import torch
        >>> from hfnoise.guidance import MomentumState
        >>> state = MomentumState(-0.5)
        >>> [state.update(torch.ones(1, 1)).item() for _ in range(3)]
        [1.0, 0.5, 0.75]
    """

    def __init__(self, momentum: float) -> None:
        check_momentum(momentum)
        self.momentum = momentum
        self._average: Tensor | None = None
        self._before: Tensor | None = None

    def update(self, delta: Tensor, *, advance: bool = True) -> Tensor:
        """Return delta + momentum m, of the shape of `delta`, in float32.

        Args:
            delta (`torch.Tensor` of shape `(batch, ...)`): of this evaluation, in units of x0, whatever the model puts
                out: those are the same at every step.
            advance (`bool`, defaults to `True`): keep the result as m. `False` on the second and further evaluations
                of one step (Heun, KDPM2): there the m of the step before is used again. Departure: the official code
                advances at every evaluation, which is unstable with such solvers.

        Raises:
            ValueError: if the shape changed in mid-run.
        """
        delta = widened(delta)
        if advance:
            self._before = self._average
        if self._before is not None and self._before.shape != delta.shape:
            raise ValueError(
                f"the momentum is of shape {tuple(self._before.shape)} and the update of {tuple(delta.shape)}: the "
                "batch or the size changed in mid-run. Make a new MomentumState, or call reset(), for every run."
            )
        running = delta if self._before is None else delta + self.momentum * self._before
        if advance:
            self._average = running
        return running

    def reset(self) -> None:
        """Forget everything: for the next run, or when another model takes over."""
        self._average = self._before = None


def projected_update(
    cond: Tensor,
    uncond: Tensor,
    eta: float = 0.0,
    norm_threshold: float | None = None,
    momentum_state: MomentumState | None = None,
    *,
    dims: Sequence[int] | None = None,
    advance: bool = True,
) -> Tensor:
    """Return the update of APG (arXiv 2410.02416, Algorithm 1): guided = cond + (guidance_scale - 1) update.

    In order: momentum, clamp of the norm, and projection, which scales by `eta` the part that is parallel to the
    prediction and so only makes it brighter. Of x0 predictions: applied to eps the images are barely different from
    CFG (their figure 12). For other outputs use [`projected_output_update`].

    Departures: a closed form in float32, s (m + (eta - 1) rho D) with rho = <m, D> / ||D||^2, for the official
    float64 projection, which some accelerators lack: off by some 1e-7 of the update. diffusers'
    `AdaptiveProjectedGuidance` adds the update to `uncond` and with weight `guidance_scale`, which is neither.

    Args:
        cond (`torch.Tensor` of shape `(batch, ...)`): conditional x0.
        uncond (`torch.Tensor` of shape `(batch, ...)`): unconditional x0.
        eta (`float`, defaults to `0.0`): what is kept of the parallel part; 0 in all of the paper, 1 is CFG.
        norm_threshold (`float`, *optional*): r, the largest norm of an update, over all of `dims`; 0 or `None` is
            none. The paper's: 2.5 (EDM2-S), 5 (DiT), 15 (SDXL).
        momentum_state ([`MomentumState`], *optional*): of this run; it is advanced.
        dims (`Sequence[int]`, *optional*): what norm and projection run over, all but the batch by default. Audio
            and video models may want time or space alone.
        advance (`bool`, defaults to `True`): see [`MomentumState.update`].

    Returns:
        `torch.Tensor` of the shape of `cond`, float32 (float64 for float64 predictions).

    Raises:
        TypeError: if a prediction is no floating-point tensor, an option no number, or `momentum_state` no state.
        ValueError: if shapes differ, or `eta`, `norm_threshold` or `dims` are out of range.

    Example:
        >>> import torch
        >>> from hfnoise.guidance import projected_update
        >>> projected_update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -1.0]])).tolist()
        [[0.0, 1.0]]
    """
    check_pair(cond, uncond)
    check_projection(eta, norm_threshold)
    dims = sample_dims(cond, dims)
    direction = widened(cond)
    update = direction - widened(uncond)
    return _clamped_and_projected(update, direction, eta, norm_threshold, momentum_state, dims, advance)


def projected_output_update(
    cond: Tensor,
    uncond: Tensor,
    model_input: Tensor,
    point: DenoisingPoint,
    eta: float = 0.0,
    norm_threshold: float | None = None,
    momentum_state: MomentumState | None = None,
    *,
    dims: Sequence[int] | None = None,
    advance: bool = True,
) -> Tensor:
    """Return the update of APG on x0, in units of the model's output: eps, v or a flow's velocity.

    A difference of outputs is a multiple of that of x0, so only the direction cond -> x0 is computed anew. Where x0
    does not follow from the output, or no longer depends on it (the last step), the plain difference is returned.

    Args:
        cond, uncond (`torch.Tensor` of shape `(batch, ...)`): outputs of the model.
        model_input (`torch.Tensor` of the same shape): what it was given, scaled as it was.
        point ([`DenoisingPoint`]): of this step.
        eta, norm_threshold, momentum_state, dims, advance: see [`projected_update`]; norm and momentum are of x0.

    Returns:
        `torch.Tensor` of the shape of `cond`, float32 (float64 for float64 predictions).

    Raises:
        TypeError: if a prediction is no floating-point tensor, an option no number, or `momentum_state` no state.
        ValueError: if shapes differ, or `eta`, `norm_threshold` or `dims` are out of range.

    Example:
        >>> import torch
        >>> from hfnoise.guidance import DenoisingPoint, projected_output_update
        >>> point = DenoisingPoint.from_sigma("flow_prediction", 0.5)
        >>> cond, uncond, x = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]])
        >>> projected_output_update(cond, uncond, x, point).tolist()  # x0 is (0, 0.5): nothing of it is parallel
        [[-1.0, 0.0]]
    """
    check_pair(cond, uncond)
    check_pair(cond, model_input)
    check_projection(eta, norm_threshold)
    dims = sample_dims(cond, dims)
    difference = widened(cond) - widened(uncond)
    if not point.has_denoised or abs(point.denoised_per_output) < _LEAST_SCALE:
        return difference
    scale = point.denoised_per_output
    direction = point.denoised(model_input, cond)
    update = _clamped_and_projected(difference * scale, direction, eta, norm_threshold, momentum_state, dims, advance)
    return update / scale


def check_momentum(momentum: float) -> None:
    """Refuse a momentum that is no number in (-1, 1).

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range.
    """
    check_number("momentum", momentum)
    if not -1 < momentum < 1:
        raise ValueError(f"momentum must lie in (-1, 1), got {momentum}; the paper uses -0.75 and -0.5, 0 is none.")


def check_projection(eta: float, norm_threshold: float | None) -> None:
    """Refuse options of APG that are out of range.

    Args:
        eta (`float`): what is kept of the parallel part, finite.
        norm_threshold (`float`, *optional*): the largest norm, at least 0.

    Raises:
        TypeError: if one is no number.
        ValueError: if one is out of range.
    """
    check_number("eta", eta)
    if norm_threshold is not None:
        check_number("norm_threshold", norm_threshold)
    if not math.isfinite(eta):
        raise ValueError(f"eta must be a finite number, got {eta}; 0 is the paper's, 1 is no projection.")
    if norm_threshold is not None and not norm_threshold >= 0:
        raise ValueError(f"norm_threshold must be at least 0 (0 or None is none), got {norm_threshold}.")


def _clamped_and_projected(
    update: Tensor,
    direction: Tensor,
    eta: float,
    norm_threshold: float | None,
    momentum_state: MomentumState | None,
    dims: Sequence[int],
    advance: bool,
) -> Tensor:
    if momentum_state is not None:
        if not isinstance(momentum_state, MomentumState):
            raise TypeError(
                f"momentum_state must be a MomentumState, one for each run, or None, got {momentum_state!r}: the "
                "number alone does not remember the steps before. Make one: MomentumState(-0.5)."
            )
        update = momentum_state.update(update, advance=advance)
    # An all-zero prediction has no direction: nothing is parallel to it.
    tiny = torch.finfo(update.dtype).tiny
    parallel = inner(update, direction, dims) / inner(direction, direction, dims).clamp_min(tiny)
    projected = torch.addcmul(update, (eta - 1) * parallel, direction)
    if not norm_threshold:
        return projected
    return projected * (norm_threshold / norm(update, dims).clamp_min(tiny)).clamp(max=1.0)
