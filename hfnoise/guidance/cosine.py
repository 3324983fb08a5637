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
        `torch.Tensor` of shape `(batch,)`, float32 (float64 for float64 predictions), in [-1, 1]; NaN where a
        prediction is not finite, which no threshold counts as reached.

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
    dims = tuple(range(1, left.dim())) if per_sample else tuple(range(left.dim()))
    left_norm, right_norm = norm(left, dims), norm(right, dims)
    # Not an epsilon under the quotient: latents of a small norm would all look alike.
    tiny = torch.finfo(left.dtype).tiny
    difference = left / left_norm.clamp_min(tiny) - right / right_norm.clamp_min(tiny)
    cosine = 1 - inner(difference, difference, dims) / 2
    left_zero, right_zero = left_norm <= tiny, right_norm <= tiny
    cosine = torch.where(left_zero | right_zero, (left_zero & right_zero).to(cosine.dtype), cosine)
    # A NaN norm is neither zero nor not: it stays NaN.
    return cosine.clamp(-1, 1).expand(len(cond), *cosine.shape[1:]).reshape(len(cond))
