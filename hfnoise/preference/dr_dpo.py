"""Dr. DPO (arXiv 2407.07880): the log-mean-exp over a batch of pair losses, and the weights it gives to the pairs."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Below it a pair whose loss is 1 nat above the smallest has a weight that is no normal number of float32 any more.
SMALLEST_DR_BETA = -1.0 / math.log(torch.finfo(torch.float32).tiny)


def dr_dpo_weights(losses: Float[Tensor, " batch"], dr_beta: float) -> Float[Tensor, " batch"]:
    """Return the weight of each pair in the gradient of Dr. DPO, softmax(-losses / dr_beta) over the batch.

    Dr. DPO (arXiv 2407.07880): pairs with a large loss, likely flipped ones, lose their weight. With one pair
    the weight is 1 and Dr. DPO is DPO, so the batch must be the whole one, over processes and accumulation.

    Args:
        losses (`torch.Tensor` of shape `(batch,)`, floating): losses per pair; half precision is computed in float32.
        dr_beta (`float`): temperature, above 0; infinity gives equal weights, towards 0 all goes to the smallest loss.

    Returns:
        `torch.Tensor` of shape `(batch,)`: the weights, summing to 1, without a graph.

    Raises:
        ValueError: if `dr_beta` is not above 0, or `losses` is empty or not of shape `(batch,)`.

    Example:
        >>> import torch
        >>> from hfnoise.preference import dr_dpo_weights
        >>> [round(x, 3) for x in dr_dpo_weights(torch.tensor([0.1, 0.7, 3.0]), dr_beta=1.0).tolist()]
        [0.624, 0.342, 0.034]
    """
    return torch.softmax(_checked(losses, dr_beta).detach() / -dr_beta, dim=0)


def dr_dpo_value(losses: Float[Tensor, " batch"], dr_beta: float) -> Float[Tensor, ""]:
    """Return the Dr. DPO loss of a whole batch, -dr_beta log mean exp(-losses / dr_beta), with its graph.

    Dr. DPO (arXiv 2407.07880). The official code takes exp of the bare losses, which underflows for losses
    above 87 `dr_beta`, and cancels for a large `dr_beta`; here the losses are taken relative to their minimum, or to
    their mean where `dr_beta` exceeds their range, and the logarithm is that of 1 + x.

    Args:
        losses (`torch.Tensor` of shape `(batch,)`, floating): losses per pair; half precision is computed in float32.
        dr_beta (`float`): temperature, above 0; towards infinity the value is the mean of the losses.

    Returns:
        `torch.Tensor` of shape `()`: the loss.

    Raises:
        ValueError: if `dr_beta` is not above 0, or `losses` is empty or not of shape `(batch,)`.

    Example:
        >>> import torch
        >>> from hfnoise.preference import dr_dpo_value
        >>> round(dr_dpo_value(torch.tensor([0.1, 0.7, 3.0]), dr_beta=1.0).item(), 4)
        0.7262
    """
    losses = _checked(losses, dr_beta)
    if math.isinf(dr_beta):
        return losses.mean()
    fixed = losses.detach()
    smooth = bool(fixed.max() - fixed.min() <= dr_beta)
    # The value does not depend on the reference, so that its gradient may be left out.
    reference = fixed.mean() if smooth else fixed.min()
    return reference - dr_beta * torch.log1p(torch.expm1((reference - losses) / dr_beta).mean())


def _checked(losses: Tensor, dr_beta: float) -> Tensor:
    if not dr_beta > 0:  # also NaN
        raise ValueError(
            f"dr_beta must be above 0, got {dr_beta!r}: 1 is the paper's choice, and a large one gives DPO."
        )
    if losses.dim() != 1 or losses.numel() == 0 or not losses.is_floating_point():
        raise ValueError(
            f"losses must be a floating tensor of shape (batch,) with at least one pair, got {losses.dtype}, "
            f"{tuple(losses.shape)}."
        )
    return losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses
