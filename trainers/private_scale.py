"""How a Trainer adds the losses of its rows up, so that each unit gets back the loss it would have alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossScale:
    """Found out by `find_loss_scale`, not assumed: the same model sums, averages rows or averages tokens.

    The loss of a unit is what the stock Trainer computes for the rows of that unit alone: the mean over its tokens,
    over its rows or over its pairs. A gradient is linear in the loss, so the factors are applied to the gradients.

    Args:
        reduction (`str`): of the batch: `"sum"` over tokens or rows (the Trainer was given `num_items_in_batch=1`),
            `"mean"` over rows, `"token_mean"` over all tokens of the batch; `"alone"` where every unit is a batch of
            its own (`grad_mode="loop"`), and no factor is needed.
        copies (`int`): rows of the model's batch for a row of the dataset; 2 for preference pairs.
        shifts_labels (`bool`): whether the first label of a row is not predicted.

    Example:
        >>> import torch
        >>> from hfnoise.trainers.private_scale import LossScale
        >>> scale = LossScale("mean", copies=2, shifts_labels=False)
        >>> scale.row_weights({}, torch.tensor([True, True, True, False]), rows_per_unit=1).tolist()
        [4.0, 4.0, 4.0, 0.0]
    """

    reduction: str
    copies: int
    shifts_labels: bool

    @property
    def num_items_in_batch(self) -> float | None:
        """What the Trainer is told to divide by."""
        return 1.0 if self.reduction == "sum" else None

    def row_weights(self, inputs: dict[str, Any], counts: Tensor, rows_per_unit: int) -> Tensor:
        """Return the factor of the gradient of each row of the dataset, 0 for rows that do not count.

        Args:
            inputs (`dict[str, Tensor]`): of the model.
            counts (`Tensor[rows]`): which rows count.
            rows_per_unit (`int`): adjacent rows that make a unit.

        Returns:
            `Tensor[rows]`, float32.
        """
        sizes = torch.ones_like(counts, dtype=torch.float32)
        if self.reduction != "mean":
            sizes = row_tokens(inputs, self.shifts_labels).to(counts.device, torch.float32)
        of_unit = (sizes * counts).view(-1, rows_per_unit).sum(1).repeat_interleave(rows_per_unit)
        total = 1.0 if self.reduction == "sum" else sizes.sum()
        # A unit without a token has no loss, so its factor does not matter.
        return torch.where(counts, total / of_unit.clamp(min=1.0), torch.zeros_like(sizes))


def row_tokens(inputs: dict[str, Any], shifts_labels: bool) -> Tensor:
    """Return the number of predicted tokens of each row, `Tensor[rows]`; 1 for a label of a whole row."""
    if "shift_labels" in inputs:
        labels = inputs["shift_labels"]
    else:
        labels = inputs["labels"]
        if shifts_labels and labels.ndim > 1:
            labels = labels[:, 1:]
    return labels.ne(-100).flatten(1).sum(1) if labels.ndim > 1 else labels.ne(-100).long()
