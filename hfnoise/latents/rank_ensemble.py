"""Several scores as one, though they have different units: by ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_ranks(scores: Tensor) -> Tensor:
    """Return the mean over the judges of the rank of each candidate, more being better, 0 the worst.

    The ensemble of verifiers of arXiv 2501.09732, section 4. Equal scores share the mean of their ranks. With one more
    candidate the ranks are others: they compare candidates of one search, and are no scores.

    Args:
        scores (`torch.Tensor` of shape `(judges, ..., candidates)`): more being better.

    Returns:
        `torch.Tensor` of shape `(..., candidates)`, in [0, candidates - 1].

    Example:
        >>> import torch
        >>> from hfnoise.latents import mean_ranks
        >>> mean_ranks(torch.tensor([[0.1, 0.3, 0.2], [50.0, 60.0, 60.0]]))
        tensor([0.0000, 1.7500, 1.2500])
    """
    ones, others = scores[..., :, None], scores[..., None, :]
    below = (others < ones).sum(-1).to(torch.float32)
    equal = (others == ones).sum(-1).to(torch.float32) - 1.0
    return (below + equal / 2.0).mean(0)
