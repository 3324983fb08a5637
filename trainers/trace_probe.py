"""A cheap probe of the gradient, per pair: what the LM head sends back into the final hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Columns of the random projection: the inner products of outer products are kept to about 1 / sqrt(columns * width).
_COLUMNS = 16


def pair_gradients(losses: Tensor, hidden: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """Return the gradient of every pair's loss with respect to a linear map on top of the final hidden states.

    One backward pass through the LM head gives the gradients d of all scored tokens; pairs do not share scored tokens,
    so those of a pair add up to the gradient of its own loss. The gradient of a map h -> h + W h is sum_tokens d h^T;
    h is projected to 16 random directions first, which keeps inner products on average (Johnson-Lindenstrauss).

    Args:
        losses (`torch.Tensor` of shape `(pairs,)`): with the graph; it is kept for the real backward pass.
        hidden (`torch.Tensor` of shape `(..., width)`): final hidden states, on that graph.
        tokens (`torch.Tensor` of shape `(scored,)`, int64): places of the scored tokens in `hidden`, flattened.
        rows (`torch.Tensor` of shape `(scored,)`, int64): row of the batch each belongs to; chosen rows come first,
            rejected rows after them in the same order.

    Returns:
        `torch.Tensor` of shape `(pairs, 16 * width)`, float32.
    """
    (gradient,) = torch.autograd.grad(losses.sum(), hidden, retain_graph=True)
    width, pairs = hidden.size(-1), losses.numel()
    with torch.no_grad():
        direction = _projection(width).to(hidden.device)
        gradients = gradient.reshape(-1, width)[tokens].float()
        projected = hidden.detach().reshape(-1, width)[tokens].float() @ direction
        pair = rows % pairs
        order = pair.argsort(stable=True)
        sizes = torch.bincount(pair, minlength=pairs).tolist()
        parts = zip(gradients[order].split(sizes), projected[order].split(sizes), strict=True)
        return torch.stack([(own.T @ states).flatten() for own, states in parts])


def _projection(width: int) -> Tensor:
    """Return the random directions: the same in every step, process and resumed run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(width, _COLUMNS, generator=generator) / _COLUMNS**0.5


def scored_tokens(hidden: Tensor, tap: Any) -> tuple[Tensor, Tensor]:
    """Return the places of the scored tokens in the flattened hidden states, and the row of the batch of each.

    Args:
        hidden (`torch.Tensor` of shape `(rows, length, width)`, or `(1, tokens, width)` with shared prefixes).
        tap ([`ForwardTap`]): that saw the forward pass.
    """
    tree = getattr(tap.model, "row", None)
    if tree is not None:
        return tree.scored, tree.targets // tree.padded_shape[1]
    scored = tap.labels[:, 1:] != -100
    # Prompt-learning adapters put virtual tokens in front.
    first = hidden.size(1) - tap.labels.size(1)
    rows, columns = scored.nonzero(as_tuple=True)
    return rows * hidden.size(1) + first + columns, rows
