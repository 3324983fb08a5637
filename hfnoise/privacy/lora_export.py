"""One pair of factors for all that a federated LoRA layer has learned, whatever was folded away."""

from __future__ import annotations

from collections.abc import Sequence

from hfnoise.privacy.lora_factors import LoraA, LoraB, LoraFactors, stack_factors


def export_factors(
    lora_A: LoraA, lora_B: LoraB, folded: Sequence[LoraFactors] = (), rank: int | None = None
) -> tuple[LoraFactors, float]:
    """Return one pair of factors for a layer with everything folded, and the norm of what a truncation left out.

    Args:
        lora_A (`torch.Tensor` of shape `(rank, inputs)`).
        lora_B (`torch.Tensor` of shape `(outputs, rank)`).
        folded (sequence of `LoraFactors`, defaults to none): of every [`refresh_lora`].
        rank (`int`, *optional*): truncate to it, by the singular values of the whole sum, without a dense matrix.
            Default: the ranks add up, r (1 + folds) when all directions are replaced each time, and nothing is lost.

    Returns:
        `tuple[LoraFactors, float]`: the factors, and the Frobenius norm of the rest in units of B A, 0 unless
        truncated.

    Raises:
        ValueError: if `rank` exceeds what there is.

    Example:
        >>> import torch
        >>> from hfnoise.privacy import LoraFactors, export_factors
        >>> more = LoraFactors(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0], [0.0]]))
        >>> factors, left_out = export_factors(torch.eye(1, 2), torch.ones(2, 1), [more])
        >>> factors.dense().tolist(), left_out
        ([[1.0, 2.0], [1.0, 0.0]], 0.0)
    """
    parts = [LoraFactors(lora_A.detach(), lora_B.detach()), *folded]
    whole = stack_factors(parts)
    return (whole, 0.0) if rank is None else whole.truncated(rank)
