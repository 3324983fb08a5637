"""The quantities of one micro-batch of preference pairs that losses and metrics are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PairBatch:
    """Margins and scores of a micro-batch; all tensors are of shape `(batch,)`, floats in float32, on the device.

    Args:
        margins: beta * (chosen_scores - rejected_scores), with the graph of the policy.
        chosen_scores: log pi_theta - log pi_ref of the chosen completion.
        rejected_scores: the same of the rejected completion.
        chosen_lengths: number of completion tokens.
        rejected_lengths: the same of the rejected completion.
        flip_rate: flip rate per pair, if the dataset has them.
        weight: weight per pair, if the dataset has them.
        annotator: number of the annotator per pair, if the dataset names them.
        index: row of the pair in the user's dataset, if known.
    """

    margins: Tensor
    chosen_scores: Tensor
    rejected_scores: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    flip_rate: Tensor | None = None
    weight: Tensor | None = None
    annotator: Tensor | None = None
    index: Tensor | None = None


def pair_batch(log_probs: Tensor, inputs: dict[str, Any], beta: float, columns: dict[str, Tensor]) -> PairBatch:
    """Return the pair quantities of a micro-batch, computed in the order of operations of TRL, so equal to the bit.

    Args:
        log_probs (`torch.Tensor` of shape `(2 * batch, length - 1)`, float32): of the policy, 0 outside completions;
            rows are all chosen, then all rejected. Prompt-learning adapters put more positions in front.
        inputs (`dict`): with `completion_mask` of shape `(2 * batch, length)` and the reference log-probabilities.
        beta (`float`): temperature of DPO.
        columns (`dict[str, torch.Tensor]`): the per-pair columns, by the field names of [`PairBatch`].
    """
    completion_mask = inputs["completion_mask"][:, 1:]
    chosen, rejected = log_probs[:, -completion_mask.size(1) :].sum(dim=1).chunk(2)
    chosen_lengths, rejected_lengths = completion_mask.sum(dim=1).chunk(2)
    chosen_scores = chosen - inputs["ref_chosen_logps"]
    rejected_scores = rejected - inputs["ref_rejected_logps"]
    return PairBatch(
        margins=beta * (chosen_scores - rejected_scores),
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        **columns,
    )
