"""Causal attention of a tree row: a branch sees its prompt and itself, not the branches beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from hfnoise.preference.tree_rows import TreeSegments

# The kernel under torch's scaled_dot_product_attention on a CPU. It also returns the log of the softmax denominator,
# with which parts over different keys can be put together exactly; the public function keeps it to itself.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tree_attention(query: Tensor, key: Tensor, value: Tensor, segments: TreeSegments, scaling: float) -> Tensor:
    """Return softmax attention of a tree row, equal to that of its padded rows.

    On a CPU the branches of a prompt attend to the prefix in one kernel call without a mask, each attends to itself
    causally, and the two are merged by their softmax denominators (as in arXiv 2402.05099, there for inference; the
    backward needs only the merged output and denominator). So no key is copied and no masked score is computed.
    Elsewhere every branch attends to its prefix and itself joined, in one call of `scaled_dot_product_attention`.

    Args:
        query (`torch.Tensor` of shape `(1, heads, tokens, head_dim)`, floating point).
        key (`torch.Tensor` of shape `(1, key_heads, tokens, head_dim)`): `key_heads` divides `heads`.
        value (`torch.Tensor` of shape `(1, key_heads, tokens, value_dim)`).
        segments (`TreeSegments`): of the row.
        scaling (`float`): factor of the scores, usually `head_dim ** -0.5`.

    Returns:
        `torch.Tensor` of shape `(1, heads, tokens, value_dim)`.

    Raises:
        ValueError: if the segments are of another row.

    Example:
        >>> import torch
        >>> from hfnoise.preference.tree_attention import tree_attention
        >>> from hfnoise.preference.tree_rows import TreeSegments
        >>> states = torch.randn(3, 1, 2, 9, 8)
        >>> tree_attention(*states, TreeSegments((3,), ((4, 2),)), scaling=8**-0.5).shape
        torch.Size([1, 2, 9, 8])
    """
    if query.size(0) != 1 or query.size(2) != segments.tokens:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, but the segments describe 1 row of {segments.tokens} tokens; give "
            "the segments of this row."
        )
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):  # the kernel called by its own name would miss the cast
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if device_type == "cpu" and key.size(-1) == value.size(-1):
        return _MergedAttention.apply(query, key, value, segments, scaling)  # type: ignore[no-any-return, no-untyped-call]
    return attention_by_branch(query, key, value, segments, scaling)


def attention_by_branch(query: Tensor, key: Tensor, value: Tensor, segments: TreeSegments, scaling: float) -> Tensor:
    """Return what [`tree_attention`] does, on any device, with torch's public functions: one call per branch."""
    key, value = _for_every_head(key, query.size(1)), _for_every_head(value, query.size(1))
    outputs = []
    for prefix, branches in _slices(segments):
        parts = [[prefix]] + [[prefix, branch] for branch in branches]
        for part in parts:
            own = query[:, :, part[-1]]
            keys, values = (torch.cat([states[:, :, place] for place in part], 2) for states in (key, value))
            if own.size(2):
                mask = causal_lower_right(own.size(2), keys.size(2))
                outputs.append(F.scaled_dot_product_attention(own, keys, values, attn_mask=mask, scale=scaling))
    return torch.cat(outputs, 2)


def dense_tree_mask(segments: TreeSegments, device: torch.device | str = "cpu") -> Tensor:
    """Return the attention of a tree row as a mask of shape `(1, 1, tokens, tokens)`, bool: True where it looks.

    Quadratic in the whole row; the definition that the fast ways are tested against.

    Example:
        >>> from hfnoise.preference.tree_attention import dense_tree_mask
        >>> from hfnoise.preference.tree_rows import TreeSegments
        >>> dense_tree_mask(TreeSegments((1,), ((1, 1),)))[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    mask = torch.zeros(segments.tokens, segments.tokens, dtype=torch.bool, device=device)
    for prefix, branches in _slices(segments):
        for own in (prefix, *branches):
            mask[own, prefix] = True
            mask[own, own] = True
    return mask.tril()[None, None]


def _slices(segments: TreeSegments) -> Iterator[tuple[slice, list[slice]]]:
    """Yield the place of every prefix and the places of its branches."""
    start = 0
    for prefix, lengths in zip(segments.prefixes, segments.branches, strict=True):
        ends = [start + prefix]
        for length in lengths:
            ends.append(ends[-1] + length)
        yield slice(start, ends[0]), [slice(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]
        start = ends[-1]


def _for_every_head(states: Tensor, heads: int) -> Tensor:
    """Return keys or values once for every query head that shares them."""
    return states if states.size(1) == heads else states.repeat_interleave(heads // states.size(1), dim=1)


def _kernel_calls(segments: TreeSegments) -> Iterator[tuple[slice, slice, bool]]:
    """Yield queries, keys and whether causal, of each kernel call: a call over a prefix follows those it adds to."""
    for prefix, branches in _slices(segments):
        for own in (prefix, *branches):
            if own.stop > own.start:
                yield own, own, True
        everything = slice(prefix.stop, branches[-1].stop)
        if prefix.stop > prefix.start and everything.stop > everything.start:
            yield everything, prefix, False


class _MergedAttention(torch.autograd.Function):
    """Attention of a tree row from kernel calls over parts of the keys."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: TreeSegments, scaling: float) -> Tensor:
        keys, values = _for_every_head(key, query.size(1)), _for_every_head(value, query.size(1))
        batch, heads, tokens, width = query.shape
        # The layout in which transformers reads it.
        output = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
        # float32 for half precisions, as the kernel returns it.
        denominator = torch.empty(batch, heads, tokens, dtype=torch.promote_types(query.dtype, torch.float32))
        for own, seen, is_causal in _kernel_calls(segments):
            part, log_sum = _forward(
                query[:, :, own], keys[:, :, seen], values[:, :, seen], 0.0, is_causal, scale=scaling
            )
            if is_causal:
                output[:, :, own], denominator[:, :, own] = part, log_sum
            else:
                before = denominator[:, :, own]
                total = torch.logaddexp(before, log_sum)
                output[:, :, own] = torch.lerp(
                    output[:, :, own].to(total.dtype), part.to(total.dtype), torch.exp(log_sum - total)[..., None]
                ).to(output.dtype)
                denominator[:, :, own] = total
        ctx.save_for_backward(query, key, value, output, denominator)
        ctx.segments, ctx.scaling = segments, scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, denominator = ctx.saved_tensors
        keys, values = _for_every_head(key, query.size(1)), _for_every_head(value, query.size(1))
        of_query, of_keys, of_values = torch.empty_like(query), torch.empty_like(keys), torch.empty_like(values)
        gradient = gradient.contiguous() if gradient.stride(-1) != 1 else gradient
        for own, seen, is_causal in _kernel_calls(ctx.segments):
            # With the output and denominator over all keys the kernel gives the gradient's share of these keys.
            shares = _backward(
                gradient[:, :, own], query[:, :, own], keys[:, :, seen], values[:, :, seen], output[:, :, own],
                denominator[:, :, own], 0.0, is_causal, scale=ctx.scaling,
            )  # fmt: skip
            for whole, place, share in zip((of_query, of_keys, of_values), (own, seen, seen), shares, strict=True):
                if is_causal:
                    whole[:, :, place] = share
                else:
                    whole[:, :, place] += share
        return of_query, _sum_over_heads(of_keys, key), _sum_over_heads(of_values, value), None, None


def _sum_over_heads(gradient: Tensor, states: Tensor) -> Tensor:
    """Return the gradient of keys or values from that of their copies for every head."""
    if gradient.shape == states.shape:
        return gradient
    _, heads, tokens, width = gradient.shape
    return gradient.reshape(1, states.size(1), heads // states.size(1), tokens, width).sum(2)
