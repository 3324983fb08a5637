"""CHES from the reference pass: the final hidden states are caught on their way to the fused LM head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor

from hfnoise.preference.ches import ches_from_sums, masked_sum

# Columns that a pass of the reference can give, in the order of their computation.
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
CHES_COLUMNS = ("ches", "ln_ches")


class HiddenStates:
    """Holds the final hidden states (after the final norm) of the last forward pass of a backbone."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, module: Any, arguments: Any, output: Any) -> None:
        self.last = output.last_hidden_state


@contextmanager
def final_hidden_states(model: Any) -> Iterator[HiddenStates]:
    """Catch the final hidden states of the forward passes of a causal language model, with or without PEFT.

    TRL's fused LM head calls `model.base_model(...)` and keeps nothing of its output but the log-probabilities. A
    forward hook on that backbone sees the output; it changes nothing and is gone afterwards.

    Args:
        model: an unwrapped causal language model, or a PEFT model around one.
    """
    causal_model = model.get_base_model() if is_peft_model(model) else model
    caught = HiddenStates()
    handle = causal_model.base_model.register_forward_hook(caught)
    try:
        yield caught
    finally:
        handle.remove()


def ches_of_batch(caught: HiddenStates, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return CHES and ln-CHES of the pairs of a padded batch, shape `(batch,)`, float32.

    Args:
        caught ([`HiddenStates`]): after the forward pass of the batch.
        completion_mask (`torch.Tensor` of shape `(2 * batch, length)`): 1 on the tokens of the answers; rows are all
            chosen, then all rejected.

    Raises:
        RuntimeError: if the hidden states are not those of the batch.
    """
    hidden = caught.last
    length = completion_mask.size(1)
    if hidden is None or hidden.size(0) != completion_mask.size(0) or hidden.size(1) < length:
        shape = None if hidden is None else tuple(hidden.shape)
        raise RuntimeError(
            f"the backbone gave hidden states of shape {shape} for tokens of shape {tuple(completion_mask.shape)}: "
            "its layout is not that of the batch, so CHES cannot be computed. Leave compute_ches out."
        )
    # The hidden state before a token predicts it. Prompt-learning adapters put virtual tokens in front.
    predicting = hidden[:, -length:][:, :-1]
    sums, counts = masked_sum(predicting, completion_mask[:, 1:].to(hidden.device))
    (chosen_sum, rejected_sum), (chosen_count, rejected_count) = sums.chunk(2), counts.chunk(2)
    ches, ln_ches = ches_from_sums(chosen_sum, chosen_count, rejected_sum, rejected_count)
    return ches.float(), ln_ches.float()


def refuse_prefix_sharing(args: Any) -> None:
    """Raise ValueError if the reference pass does not see one padded row per answer.

    Raises:
        ValueError: if `args.prefix_sharing` is set.
    """
    if getattr(args, "prefix_sharing", False):
        raise ValueError(
            "CHES cannot be computed with prefix_sharing=True: it reads the hidden states of one padded row per "
            "answer, and with shared prefixes they lie in another layout. Score the pairs first with "
            "hfnoise.score_dataset, or set prefix_sharing=False."
        )
