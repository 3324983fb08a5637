"""The refresh extension, our own: fold weak directions of a LoRA layer away and put new rows in their place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfnoise.privacy.lora_factors import LoraA, LoraB, LoraFactors, check_finite
from hfnoise.privacy.lora_rotation import orthonormal_rows, rotate_lora

# What is left of a given unit row after taking the rows before it out; below this its direction is mostly rounding.
_INDEPENDENT = 1e-3


class RefreshedLora(NamedTuple):
    """What [`refresh_lora`] returns: the factors to train on, and what was `folded` into the frozen part.

    `folded.dense()` is in units of B A: a layer adds scaling times it to its weight, as it does with B A.
    """

    lora_A: LoraA
    lora_B: LoraB
    folded: LoraFactors


def refresh_lora(
    lora_A: LoraA,
    lora_B: LoraB,
    replaced: int,
    *,
    generator: torch.Generator | None = None,
    new_rows: Float[Tensor, "replaced inputs"] | None = None,
) -> RefreshedLora:
    """Return factors in which the weakest directions are folded away and replaced by new ones: **our own extension**.

    No paper describes it. FedSVD never changes the row space of A (docs/fedsvd.md has the proof), so that the update
    of the weight stays in a space of `rank` directions chosen before any data was seen. Here, every few rounds, the
    factors are rotated, the `replaced` directions of least singular value move to a low-rank list of frozen updates
    (`folded`), and rows orthonormal to the kept ones take their place, with columns of zeros in B. The function of the
    layer does not change: B A before = B A after + folded.

    Formal guarantee: none of its own, and none is lost, as long as new rows do not depend on private data: the rest
    is a function of released factors (post-processing), so it costs no epsilon.

    Args:
        lora_A (`torch.Tensor` of shape `(rank, inputs)`, float32 or float64).
        lora_B (`torch.Tensor` of shape `(outputs, rank)`, same dtype).
        replaced (`int`): number s of new directions, in [1, rank].
        generator (`torch.Generator`, *optional*): draws the new rows, normal, then made orthonormal. Either this or
            `new_rows`.
        new_rows (`torch.Tensor` of shape `(replaced, inputs)`, *optional*): such as the next
            [`right_singular_rows`] of the base weight. Made orthonormal to the kept rows and to each other.

    Returns:
        [`RefreshedLora`]: unpacks as `lora_A, lora_B, folded`, in the dtype of the factors.

    Raises:
        TypeError: for factors that are not float32 or float64.
        ValueError: if `replaced` is out of range, both or none of `generator` and `new_rows` are given, or a given row
            lies in the space of those before it.

    Example:
        >>> import torch
        >>> from hfnoise.privacy import refresh_lora
        >>> A, B = torch.eye(2, 4), torch.diag(torch.tensor([3.0, 1.0]))
        >>> new_A, new_B, folded = refresh_lora(A, B, 1, generator=torch.Generator().manual_seed(0))
        >>> new_B.tolist(), folded.dense().tolist()
        ([[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    """
    rows, columns, _ = rotate_lora(lora_A, lora_B)
    return replace_weakest(rows, columns, replaced, generator=generator, new_rows=new_rows)


def replace_weakest(
    lora_A: LoraA,
    lora_B: LoraB,
    replaced: int,
    *,
    generator: torch.Generator | None = None,
    new_rows: Float[Tensor, "replaced inputs"] | None = None,
) -> RefreshedLora:
    """Return what [`refresh_lora`] does, from factors that [`rotate_lora`] has rotated already; arguments as there.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.lora_refresh import replace_weakest
        >>> A, B = torch.eye(1, 2), torch.ones(1, 1)
        >>> replace_weakest(A, B, 1, new_rows=torch.tensor([[2.0, 0.0]])).lora_A.abs().tolist()
        [[1.0, 0.0]]
    """
    rank = len(lora_A)
    if isinstance(replaced, bool) or not isinstance(replaced, int) or not 1 <= replaced <= rank:
        raise ValueError(f"replaced must be a whole number between 1 and the rank {rank}, got {replaced!r}.")
    if (generator is None) == (new_rows is None):
        raise ValueError("new directions come from generator or from new_rows: give one of the two.")
    kept = rank - replaced
    folded = LoraFactors(lora_A[kept:].clone(), lora_B[:, kept:].clone())
    fresh = complete_rows(lora_A[:kept], replaced, generator=generator, new_rows=new_rows)
    rows = torch.cat([lora_A[:kept], fresh.to(lora_A)])
    columns = lora_B.clone()
    columns[:, kept:] = 0
    return RefreshedLora(rows, columns, folded)


def complete_rows(
    kept: Float[Tensor, "kept inputs"],
    count: int,
    *,
    generator: torch.Generator | None = None,
    new_rows: Float[Tensor, "count inputs"] | None = None,
) -> Float[Tensor, "count inputs"]:
    """Return rows, float64, orthonormal among themselves and to the kept ones: drawn, or made from given ones.

    Raises:
        ValueError: if there is no room for them, or a given row lies in the space of those before it.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.lora_refresh import complete_rows
        >>> complete_rows(torch.eye(1, 2), 1, new_rows=torch.tensor([[3.0, 4.0]])).abs().tolist()
        [[0.0, 1.0]]
    """
    inputs = kept.shape[1]
    if len(kept) + count > inputs:
        raise ValueError(f"{len(kept)} kept and {count} new rows of {inputs} inputs cannot be orthonormal.")
    if new_rows is None:
        new_rows = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    elif tuple(new_rows.shape) != (count, inputs):
        raise ValueError(f"new_rows must have the shape {(count, inputs)}, got {tuple(new_rows.shape)}.")
    check_finite(new_rows, "new_rows")
    basis = kept.detach().double()
    fresh = new_rows.detach().double().to(basis.device)
    fresh = fresh / fresh.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    # Twice: the first projection leaves rounding errors that count where little is left of a row.
    for _ in range(2):
        fresh = fresh - (fresh @ basis.mT) @ basis
    rows, triangle = orthonormal_rows(fresh)
    dependent = (triangle.diagonal() < _INDEPENDENT).nonzero().flatten().tolist()
    if dependent:
        raise ValueError(
            f"rows {dependent[:3]} of new_rows lie in the space of the kept rows and of those before them, so they "
            "add no direction. Give others (right_singular_rows with a larger skip), or a generator."
        )
    return rows
