"""Synthetic rows for `dp_check`: shaped like the training rows, with tokens drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfnoise.trainers.private_batches import PlannedRows

_VISION = ("pixel_values", "pixel_values_videos", "image_grid_thw", "input_features", "input_values")


# Rows among which the shortest, the middle and the longest are taken: padding shows between rows of different lengths.
_CANDIDATES = 32


@dataclass(frozen=True)
class CheckRows:
    """A batch and the same rows one by one.

    Args:
        batch (`dict`): inputs of the model for all rows.
        singles (`list[dict]`): inputs for each row alone, collated alone, so without the padding of the batch.
        copies (`int`): rows of the model's batch for a row of the dataset.
    """

    batch: dict[str, Any]
    singles: list[dict[str, Any]]
    copies: int


def check_rows(rows: PlannedRows, model: Any, count: int) -> CheckRows:
    """Return rows to check a loss with; shapes are those of the training data.

    Args:
        rows ([`PlannedRows`]): the training rows.
        model (`nn.Module`): whose vocabulary the tokens are drawn from.
        count (`int`): number of rows.
    """
    numbers = _of_different_lengths(rows, count)
    batch = rows.collate_rows(numbers)
    size = _main_tensor(batch).shape[0]
    if size % count:
        raise ValueError(
            f"the data collator made {size} rows of {count} rows of the dataset: rows of several units share a row of "
            "the model's batch (packing, padding-free), so no gradient belongs to one unit. Turn that off."
        )
    copies = size // count
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    singles = [dict(rows.collate_rows(number[None])) for number in numbers]
    if _is_vision(batch) or any(not t.ndim or t.shape[0] != size for t in tensors):
        # Tokens that stand for images cannot be drawn at random, nor flattened images be cut by rows.
        batch = _different_classes(dict(batch), model)
        if _has_classes(batch):
            for row, single in enumerate(singles):
                single["labels"] = batch["labels"][row : row + 1]
        return CheckRows(batch, singles, copies)
    drawn = _different_classes(_randomized(dict(batch), model), model)
    return CheckRows(
        drawn, [_alone(single, batch, drawn, slice(row, size, count)) for row, single in enumerate(singles)], copies
    )


def _is_vision(batch: dict[str, Any]) -> bool:
    return any(key in batch for key in _VISION)


def _of_different_lengths(rows: PlannedRows, count: int) -> Tensor:
    """Return rows from the shortest to the longest of some that are spread over the dataset, in their order there."""
    spread = torch.linspace(0, len(rows) - 1, count).long()
    first = rows.collate_rows(spread[:1])
    if _is_vision(first) or _main_tensor(first).ndim < 2:
        return spread
    candidates = torch.linspace(0, len(rows) - 1, _CANDIDATES).long().unique()
    lengths = torch.tensor([_main_tensor(rows.collate_rows(number[None])).shape[1] for number in candidates])
    if len(candidates) < count or bool((lengths == lengths[0]).all()):
        return spread
    ranked = lengths.argsort(stable=True)[torch.linspace(0, len(candidates) - 1, count).long()]
    return candidates[ranked].sort().values


def _alone(single: dict[str, Any], batch: dict[str, Any], drawn: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Return what the collator makes of one row alone, with the tokens that were drawn for it in the batch.

    Args:
        single (`dict`): the row collated alone.
        batch (`dict`): all rows, as the collator made them.
        drawn (`dict`): the same with random tokens and labels.
        rows (`slice`): places of the row in the batch; of pairs the chosen and the rejected answer.
    """
    in_batch = {key: value[rows] if isinstance(value, Tensor) else value for key, value in drawn.items()}
    columns = _columns(single, batch, rows)
    if columns is None:
        return in_batch
    found = dict(single)
    for key in [key for key, value in drawn.items() if value is not batch[key]]:
        found[key] = in_batch[key][:, columns] if in_batch[key].ndim > 1 else in_batch[key]
        if found[key].shape != single[key].shape:  # padded in a way of its own, as the labels of a decoder are
            return in_batch
    return found


def _columns(single: dict[str, Any], batch: dict[str, Any], rows: slice) -> slice | None:
    """Return the columns of the batch where the row is, whichever side is padded; None if that is not clear."""
    for key in ("attention_mask", "input_ids"):
        alone, together = single.get(key), batch.get(key)
        if not isinstance(alone, Tensor) or not isinstance(together, Tensor) or alone.ndim != 2:
            continue
        together, length = together[rows], alone.shape[1]
        for columns in (slice(0, length), slice(together.shape[1] - length, together.shape[1])):
            inside = together[:, columns]
            whole = key == "input_ids" or int(inside.sum()) == int(together.sum())
            if whole and torch.equal(inside, alone):
                return columns
    return None


def _main_tensor(batch: dict[str, Any]) -> Tensor:
    for key in ("input_ids", *_VISION, *batch):
        if isinstance(batch.get(key), Tensor):
            return batch[key]
    raise ValueError(f"the data collator returned no tensor, only {sorted(batch)}.")


def _randomized(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the batch with random tokens, and with fewer labels in each row than in the one before."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    settings = getattr(model, "config", None)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or settings is None:
        return batch
    config = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(config.vocab_size, ids.shape, generator=generator)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:  # some models look for the last token that is not padding
        drawn = torch.where(drawn == pad, (drawn + 1) % config.vocab_size, drawn)
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()
    new = torch.where(real, drawn, ids)
    result = {**batch, "input_ids": new}
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == ids.shape:
        counts = labels != -100
        if not torch.equal(labels[counts], ids[counts]):
            # Not the tokens themselves: classes of tokens, or masked tokens. Drawn from those that occur.
            new = drawn % (int(labels.max()) + 1)
        # A row without any label, cut off by max_length, has no loss to check with.
        counts |= real & ~counts.any(1, keepdim=True)
        result["labels"] = _fewer_labels(torch.where(counts, new, -100))
    return result


def _fewer_labels(labels: Tensor) -> Tensor:
    """Return the labels with the first `row` of them left out: a mean over rows and one over tokens must differ."""
    labels = labels.clone()
    for row, line in enumerate(labels):
        places = (line != -100).nonzero().flatten()
        dropped = min(row, max(0, places.numel() - 2))
        line[places[:dropped]] = -100
    return labels


def _has_classes(batch: dict[str, Any]) -> bool:
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and labels.ndim == 1 and labels.dtype == torch.int64


def _different_classes(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the batch with the first, the second and the last class as labels of its rows.

    Cross-entropy with weights of classes is divided by the weights of the batch, so it is no sum over rows; with rows
    of one class that would not be seen.
    """
    classes = getattr(getattr(model, "config", None), "num_labels", 0)
    if not _has_classes(batch) or classes < 2:
        return batch
    labels = torch.arange(len(batch["labels"])).clamp(max=1)
    labels[-1] = classes - 1 if len(labels) > 1 else 0
    return {**batch, "labels": labels.to(batch["labels"].device)}
