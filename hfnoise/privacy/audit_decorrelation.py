"""White-box canary scores: which canaries explain an update best, once what they have in common is taken out."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers kept of a gradient to compare it with others. Inner products are then off by 1/256 of the norms; a matrix of
# 1000 canaries takes 256 MB.
_SKETCH = 1 << 16


def sketch(gradients: Tensor) -> Tensor:
    """Return gradients shortened to at most 65536 numbers each, with nearly the same inner products.

    Every coordinate is added with a random sign into a random place (count sketch, Charikar et al. 2002).

    Args:
        gradients (`Tensor[units, size]`): flattened.

    Returns:
        `Tensor[units, min(size, 65536)]`.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.audit_decorrelation import sketch
        >>> x = torch.ones(1, 200_000)
        >>> sketch(x).shape[1], round(float(sketch(x).square().sum() / 200_000), 1)
        (65536, 1.0)
    """
    size = gradients.shape[1]
    if size <= _SKETCH:
        return gradients
    # Public, and the same for all micro-batches: nothing depends on it but the quality of a guess.
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(_SKETCH, (size,), generator=generator).to(gradients.device)
    signs = torch.randint(2, (size,), generator=generator).to(gradients) * 2 - 1
    return gradients.new_zeros(len(gradients), _SKETCH).index_add_(1, places, gradients * signs)


def decorrelated_scores(products: Tensor, gradients: Tensor, noise_variance: float) -> Tensor:
    """Return for each canary an estimate of how much of it is in an update: the linear one of least squared error.

    The update is scale * (sum_i b_i g_i + noise), where b_i is 1 or 0 by a fair coin and the noise has
    `noise_variance` in each direction. Gradients of canaries have much in common, so the inner product <update, g_i>
    mostly says how many others were in. With G_ij = <g_i, g_j>, mean 1/2 and variance 1/4 of b, the estimate is
    1/2 + (G + 4 noise_variance I)^-1 (G b - G 1/2), in which <update, g_i> / scale stands for (G b)_i. The scale is
    found from the direction that all canaries share. It is an attack: a wrong model makes it weaker, never invalid.

    Args:
        products (`Tensor[canaries]`): <update, g_i>.
        gradients (`Tensor[canaries, size]`): g_i, or what [`sketch`] leaves of them.
        noise_variance (`float`): at least 0.

    Returns:
        `Tensor[canaries]`, float64.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.audit_decorrelation import decorrelated_scores
        >>> gradients = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, -0.1]])
        >>> update = gradients[0] + gradients[1]
        >>> scores = decorrelated_scores(gradients @ update, gradients, 1e-4)
        >>> bool(scores[2] < scores[:2].min())
        True
    """
    products, rows = products.double().cpu(), gradients.double()
    gram = (rows @ rows.mT).cpu()
    half = gram.sum(1) / 2
    total = products.sum()
    explained = products * (half.sum() / total) - half if total > 0 else products
    # Keeps the solution defined where canaries are as many as directions; far below any noise that protects.
    ridge = 4 * noise_variance + 1e-6 * float(gram.diagonal().mean())
    shares: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), explained)
    return shares + 0.5
