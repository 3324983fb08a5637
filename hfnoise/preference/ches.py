"""CHES: how much DPO on a preference pair will lower the likelihood of its chosen answer (arXiv 2410.08847).

DPO raises the margin between two answers; where the model represents them alike, it can do so while both become less
likely (likelihood displacement). The centered hidden embedding similarity tells such pairs from the forward pass of
the model before training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

# The share that the paper keeps of the preference pairs made from SORRY-Bench.
DEFAULT_KEEP = 0.05
_SHOWN = 5

Hidden = Float[Tensor, "batch length hidden"]
Mask = Shaped[Tensor, "batch length"]
Scores = Float[Tensor, " batch"]


def ches_scores(
    chosen_hidden: Hidden, rejected_hidden: Hidden, chosen_mask: Mask, rejected_mask: Mask
) -> tuple[Scores, Scores]:
    """Return CHES and length-normalised CHES of preference pairs; higher means more displacement.

    The CHES score of arXiv 2410.08847 is <S+, S-> - |S+|^2, S the sum of the final hidden states over the positions
    that predict a token of the answer. Its length-normalised form, which the paper filters by, has S+ / n+ and S- / n-
    in the place of S+ and S-, n the number of those positions. Departures: positions come from a mask, so the side of
    the padding does not matter (the official batch function is right for left padding only, and silently wrong
    otherwise); and sums are in float32 at least.

    Args:
        chosen_hidden (`torch.Tensor` of shape `(batch, length, hidden)`, floating): final hidden states, after the
            final norm (`last_hidden_state` of transformers), of prompt and chosen answer.
        rejected_hidden (`torch.Tensor` of shape `(batch, other length, hidden)`, floating): of the rejected answer.
        chosen_mask (`torch.Tensor` of shape `(batch, length)`): nonzero where the hidden state predicts a token of
            the answer, end-of-sequence token included: one position before that token. At least one in each row.
        rejected_mask (`torch.Tensor` of shape `(batch, other length)`): the same for the rejected answer.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: CHES and ln-CHES, each of shape `(batch,)`, float32, or float64 if either
        hidden state is float64.

    Raises:
        ValueError: if shapes do not match, hidden states are not floating, or a mask has a row without a position.

    Example:
        >>> import torch
        >>> from hfnoise.preference import ches_scores
        >>> alike, opposite = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[-1.0, 0.0]]])
        >>> one = torch.ones(1, 1)
        >>> ches_scores(alike, alike, one, one)[0].item(), ches_scores(alike, opposite, one, one)[0].item()
        (0.0, -3.0)
    """
    _check_hidden("chosen", chosen_hidden, chosen_mask)
    _check_hidden("rejected", rejected_hidden, rejected_mask)
    return ches_from_sums(*masked_sum(chosen_hidden, chosen_mask), *masked_sum(rejected_hidden, rejected_mask))


def masked_sum(hidden: Hidden, mask: Mask) -> tuple[Tensor, Tensor]:
    """Return the sum of hidden states over the positions of a mask, and their number, for [`ches_from_sums`].

    Args:
        hidden (`torch.Tensor` of shape `(batch, length, hidden)`, floating): may hold anything, NaN included, where
            the mask is 0.
        mask (`torch.Tensor` of shape `(batch, length)`): nonzero where a position counts.

    Returns:
        Sums of shape `(batch, hidden)`, float32 or float64, and numbers of shape `(batch,)`, int64.

    Example:
        >>> import torch
        >>> from hfnoise.preference.ches import masked_sum
        >>> masked_sum(torch.tensor([[[1.0], [2.0], [float("nan")]]]), torch.tensor([[1, 1, 0]]))
        (tensor([[3.]]), tensor([2]))
    """
    counts = mask != 0
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # Set to 0, not multiplied: hidden states of padding may be NaN.
    return hidden.masked_fill(~counts[..., None], 0).sum(dim=1, dtype=dtype), counts.sum(dim=1)


def ches_from_sums(
    chosen_sum: Tensor, chosen_count: Tensor, rejected_sum: Tensor, rejected_count: Tensor
) -> tuple[Scores, Scores]:
    """Return CHES and ln-CHES as [`ches_scores`] does, from sums of hidden states made elsewhere.

    Args:
        chosen_sum (`torch.Tensor` of shape `(batch, hidden)`, float32 or float64): S+.
        chosen_count (`torch.Tensor` of shape `(batch,)`): n+, at least 1.
        rejected_sum (`torch.Tensor` of shape `(batch, hidden)`, float32 or float64): S-.
        rejected_count (`torch.Tensor` of shape `(batch,)`): n-, at least 1.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: CHES and ln-CHES, each of shape `(batch,)`.

    Raises:
        ValueError: if shapes do not match or a number of positions is below 1.

    Example:
        >>> import torch
        >>> from hfnoise.preference.ches import ches_from_sums
        >>> two, three = torch.tensor([2]), torch.tensor([3])
        >>> ches_from_sums(torch.tensor([[2.0, 0.0]]), two, torch.tensor([[3.0, 1.0]]), three)
        (tensor([2.]), tensor([0.]))
    """
    batch = chosen_sum.shape[:1]
    if chosen_sum.dim() != 2 or chosen_sum.shape != rejected_sum.shape or (*batch, *batch) != (
        *chosen_count.shape, *rejected_count.shape,
    ):  # fmt: skip
        raise ValueError(
            "sums must be of the same shape (batch, hidden) and counts of shape (batch,); got sums "
            f"{tuple(chosen_sum.shape)} and {tuple(rejected_sum.shape)}, counts {tuple(chosen_count.shape)} and "
            f"{tuple(rejected_count.shape)}."
        )
    for name, count in (("chosen", chosen_count), ("rejected", rejected_count)):
        empty = (count < 1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"the {name} answers in rows {empty[:_SHOWN]} have no position that predicts a token. Leave these "
                "pairs out, or raise max_length if truncation took their answers."
            )
    dtype = torch.promote_types(chosen_sum.dtype, rejected_sum.dtype)
    # The two terms nearly cancel where answers are alike, so their difference is taken in float64.
    chosen, rejected = chosen_sum.double(), rejected_sum.double()
    chosen_mean, rejected_mean = chosen / chosen_count[:, None], rejected / rejected_count[:, None]
    return _similarity(chosen, rejected).to(dtype), _similarity(chosen_mean, rejected_mean).to(dtype)


def _similarity(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return <chosen, rejected> - |chosen|^2 per row."""
    return (chosen * rejected).sum(dim=1) - chosen.square().sum(dim=1)


def _check_hidden(name: str, hidden: Tensor, mask: Tensor) -> None:
    if hidden.dim() != 3 or not hidden.is_floating_point() or mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"{name}_hidden must be a floating tensor of shape (batch, length, hidden) and {name}_mask of shape "
            f"(batch, length); got {hidden.dtype} of shape {tuple(hidden.shape)} and a mask of {tuple(mask.shape)}."
        )


def filter_by_ches(
    dataset: Any, keep: float | None = None, column: str = "ln_ches", max_score: float | None = None
) -> Any:
    """Return the pairs of a dataset with the lowest scores, those that displace likelihood least, in their order.

    arXiv 2410.08847 keeps the 5 % with the lowest ln-CHES. Of equal scores those in earlier rows are kept.

    Args:
        dataset (`datasets.Dataset`): with a column of scores, as `hfnoise.score_dataset` returns it.
        keep (`float`, *optional*, defaults to `0.05` unless `max_score` is given): share of the pairs to keep, in
            (0, 1]; rounded, and at least one pair.
        column (`str`, defaults to `"ln_ches"`): column of the scores, `"ln_ches"` or `"ches"`.
        max_score (`float`, *optional*): keep every pair with at most this score instead of a share.

    Returns:
        `datasets.Dataset`: the selected rows, all columns kept.

    Raises:
        ValueError: if the column is missing or holds values that are not finite, `keep` is out of range, both `keep`
            and `max_score` are given, no pair is left, or the dataset is a streaming one.

    Example:
        >>> from datasets import Dataset
        >>> from hfnoise.preference import filter_by_ches
        >>> pairs = Dataset.from_dict({"prompt": ["a", "b", "c", "d"], "ln_ches": [-1.0, -3.0, -2.0, -4.0]})
        >>> filter_by_ches(pairs, keep=0.5)["prompt"][:]
        ['b', 'd']
    """
    if not hasattr(dataset, "select") or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"filter_by_ches ranks all pairs, so it needs a map-style datasets.Dataset, got {type(dataset).__name__}. "
            "Load the pairs without streaming=True, and pass one split."
        )
    if keep is not None and max_score is not None:
        raise ValueError(f"keep={keep} and max_score={max_score} are two ways to select pairs. Give one of them.")
    keep = DEFAULT_KEEP if keep is None else keep
    if isinstance(keep, bool) or not 0 < keep <= 1:
        raise ValueError(f"keep is the share of pairs with the lowest scores, in (0, 1], got {keep!r}.")
    scores = _finite_scores(dataset, column)
    order = sorted(range(len(scores)), key=lambda row: scores[row])  # stable: of equals the earlier row comes first
    if max_score is None:
        chosen = order[: max(1, round(keep * len(scores)))]
    else:
        chosen = [row for row in order if scores[row] <= max_score]
    if not chosen:
        lowest = f"the lowest is {scores[order[0]]:.6g}" if order else "the dataset is empty"
        raise ValueError(f"no pair has {column} <= {max_score}: {lowest}. Raise max_score, or give keep.")
    return dataset.select(sorted(chosen))


def _finite_scores(dataset: Any, column: str) -> list[float]:
    if column not in dataset.column_names:
        raise ValueError(
            f"the dataset has no column {column!r}; it has {dataset.column_names}. Score it first with "
            "hfnoise.score_dataset(model, dataset), or train with compute_ches=True and filter trainer.train_dataset."
        )
    scores = list(dataset[column])
    if scores and isinstance(scores[0], (list, tuple)):
        raise ValueError(
            f"column {column!r} holds several scores per row, as BVPO's trace pairs do (with traces, without). Make a "
            "column of the one to filter by, or of their maximum, with dataset.map."
        )
    bad = [row for row, score in enumerate(scores) if score is None or not math.isfinite(score)]
    if bad:
        raise ValueError(
            f"column {column!r} holds values that are not finite in {len(bad)} of {len(scores)} rows "
            f"({bad[:_SHOWN]}): the model gave NaN or overflowed there. Remove these pairs, or score in float32."
        )
    return scores
