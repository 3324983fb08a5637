"""How alike the conditional and the unconditional prediction are: the test of Adaptive Guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from hfnoise.guidance.tensor_math import check_pair, inner, norm, widened


def cosine_similarity(cond: Tensor, uncond: Tensor, *, per_sample: bool = True) -> Tensor:
    """Return the cosine between two predictions per sample: gamma_t of Adaptive Guidance (arXiv 2312.12487).

    Once it reaches a threshold the unconditional evaluation of that sample is skipped to the end of the run. The paper
    writes it with the noise prediction eps, which does not carry over to public models: at high noise both eps are
    about x / sigma, so that 0.991 is met at the first step. Hand in denoised predictions (x0) or velocities;
    [`DenoisingPoint.in_space`] converts.

    Departures: computed as 1 - ||c / ||c|| - u / ||u|| ||^2 / 2, which is the same number and keeps its digits near 1,
    where thresholds lie (a float32 quotient is off by some 1e-7 there); in float32 for 16-bit predictions; and two
    predictions that are all zero are alike (1), one is like no other (0), where the quotient is 0 / 0.

    Args:
        cond (`torch.Tensor` of shape `(batch, ...)`): conditional predictions.
        uncond (`torch.Tensor` of shape `(batch, ...)`): unconditional or negative-prompt predictions, before any
            rescaling of them: CFG-Zero* changes the cosine of x0.
        per_sample (`bool`, defaults to `True`): `False` takes one cosine over the whole batch, as ComfyUI's node
            does, and returns it for every sample.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32 (float64 for float64 predictions), in [-1, 1], and 1 only
        for one direction to the last digit; NaN where a prediction is not finite, which reaches no threshold.

    Raises:
        TypeError: if a prediction is no floating-point tensor.
        ValueError: if the shapes differ or have no batch dimension.

    Example:
        >>> import torch
        >>> from hfnoise.guidance import cosine_similarity
        >>> cond = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> cosine_similarity(cond, torch.tensor([[2.0, 0.0], [0.0, 1.0]])).tolist()
        [1.0, 0.0]
    """
    check_pair(cond, uncond)
    left, right = widened(cond), widened(uncond)
    if not left.numel():
        return left.new_ones(len(left))
    dims = tuple(range(1, left.dim())) if per_sample else tuple(range(left.dim()))
    left, left_zero = _unit(left, dims)
    right, right_zero = _unit(right, dims)
    difference = left - right
    distance = inner(difference, difference, dims) / 2
    # Rounded to 1 it would reach a threshold of 1, which is to say never.
    cosine = torch.where(distance > 0, (1 - distance).clamp(max=1 - torch.finfo(left.dtype).eps), 1 - distance)
    cosine = torch.where(left_zero | right_zero, (left_zero & right_zero).to(cosine.dtype), cosine)
    return cosine.clamp(-1, 1).expand(len(cond), *cosine.shape[1:]).reshape(len(cond))


def _unit(prediction: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return predictions of length 1, and which of them are all zero; one that is not finite is neither."""
    # Its squares would overflow above 1e19 and vanish below 1e-23: then any two predictions would be alike. Nor is
    # there an epsilon under the quotient, for which those of a small norm would be.
    largest = prediction.abs().amax(dim=dims, keepdim=True)
    scaled = prediction / largest.clamp_min(torch.finfo(prediction.dtype).tiny)
    return scaled / norm(scaled, dims), largest == 0
