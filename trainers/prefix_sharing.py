"""Prefix sharing: TRL's padded calls of the fused head run as tree rows, by transformers' own extension points."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hfnoise.preference.tree_attention import tree_attention
from hfnoise.preference.tree_rows import IGNORED, TreeRow, tree_row
from hfnoise.trainers.prefix_sharing_refusals import refuse_leaks, refuse_prefix_sharing

# Name of the attention implementation: tree attention for tree rows, sdpa for every other call of the model.
TREE_ATTENTION = "hfnoise_tree"

# Whether the forward pass in progress is that of a tree row. The mask is made before the layers run, so this need not
# outlive the forward; what attention needs travels in the arguments, where a recomputation in the backward finds it.
_is_tree_forward: ContextVar[bool] = ContextVar("is_tree_forward", default=False)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as a tree row if the call has one, else as `sdpa`."""
    segments = kwargs.pop("tree_segments", None)
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    for name in ("softcap", "s_aux", "position_bias", "dropout"):
        if kwargs.get(name) is not None and not (name == "dropout" and kwargs[name] == 0.0):
            raise ValueError(
                f"prefix_sharing=True cannot attend with {name}, which {type(module).__name__} asks for; plain causal "
                "softmax attention is allowed. Set prefix_sharing=False."
            )
    window = kwargs.get("sliding_window")
    if window is not None and segments.longest_path > window:
        raise ValueError(
            f"prefix_sharing=True met a row of {segments.longest_path} tokens, longer than the model's sliding window "
            f"of {window}. Set max_length={window} or less, or prefix_sharing=False."
        )
    scaling = kwargs.get("scaling") or query.size(-1) ** -0.5
    return tree_attention(query, key, value, segments, scaling).transpose(1, 2), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return no mask for a tree row, whose attention needs none, else that of `sdpa`."""
    return None if _is_tree_forward.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(TREE_ATTENTION, _attention)
AttentionMaskInterface.register(TREE_ATTENTION, _mask)


@contextmanager
def _tree_forward() -> Iterator[None]:
    token = _is_tree_forward.set(True)
    try:
        yield
    finally:
        _is_tree_forward.reset(token)


class PrefixSharingForward:
    """Forwards calls to a model; those of the fused LM head with padded rows run as a tree row.

    The rows are what TRL's trainers pass: `input_ids`, `attention_mask` and `labels` with -100 outside completions.
    The output has the shapes, the zeros and, to the last bits, the values of the padded call. In the same way as
    `ForwardTap` it stands in the place of the model, wrapped by DDP, PEFT or nothing.

    Args:
        model (`torch.nn.Module`): whose attention implementation is `TREE_ATTENTION`.
        branches (`int`): rows per prompt; rows i, i + prompts, ... share one.
    """

    def __init__(self, model: Any, branches: int) -> None:
        self.model = model
        self.branches = branches
        self.row: TreeRow | None = None  # of the last call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or not kwargs.get("fused_lm_head") or kwargs.get("labels") is None:
            return self.model(*args, **kwargs)
        input_ids, labels = kwargs.pop("input_ids"), kwargs.pop("labels")
        row = self.row = tree_row(input_ids, kwargs.pop("attention_mask"), labels != IGNORED, self.branches)
        unknown = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        if unknown:
            raise ValueError(
                f"prefix_sharing=True cannot rearrange the model inputs {unknown}; input_ids, attention_mask and "
                "labels are allowed. Set prefix_sharing=False."
            )
        with _tree_forward():
            output = self.model(
                input_ids=row.input_ids, position_ids=row.position_ids, shift_labels=row.shift_labels,
                tree_segments=row.segments, **kwargs,
            )  # fmt: skip
        per_token = {
            name: row.padded(value)
            for name, value in output.items()
            if isinstance(value, Tensor) and value.shape == row.input_ids.shape
        }
        return type(output)(**{**output, **per_token})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class PrefixSharingMixin:
    """Prefix sharing for a trainer of padded rows: every model that is scored goes through `sharing_prefixes`."""

    args: Any
    model: Any
    ref_model: Any
    # Rows per prompt in the order of the collator: all chosen, then all rejected.
    branches_per_prompt: int = 2
    _is_sharing_prepared: bool = False

    def sharing_prefixes(self, model: Any) -> Any:
        """Return the model, or what runs it on tree rows with `prefix_sharing=True`.

        Raises:
            ValueError: on the first call, at construction, if a tree row would change what the model computes.
        """
        if not self.args.prefix_sharing:
            return model
        if not self._is_sharing_prepared:
            for scored in (self.model, self.ref_model):
                if scored is not None:
                    self._prepare_sharing(scored)
            self._is_sharing_prepared = True
        return PrefixSharingForward(model, self.branches_per_prompt)

    def _prepare_sharing(self, model: Any) -> None:
        """Switch the model to tree attention, for good: a backward with checkpointing attends once more.

        The name of the implementation is not saved with the model: `PretrainedConfig.to_dict` leaves it out.
        """
        unwrapped = self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
        base = unwrapped.get_base_model() if is_peft_model(unwrapped) else unwrapped
        before = base.config._attn_implementation
        refuse_prefix_sharing(unwrapped, self.args, "sdpa" if before == TREE_ATTENTION else before)
        base.set_attn_implementation(TREE_ATTENTION)
        try:
            branches = self.branches_per_prompt
            refuse_leaks(unwrapped, PrefixSharingForward(unwrapped, branches), branches)
        except ValueError:
            base.set_attn_implementation(before)
            raise
