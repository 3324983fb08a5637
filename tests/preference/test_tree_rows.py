"""Tree rows hold what the padded rows hold, and their attention is that of the padded rows."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hfnoise.preference.tree_attention import attention_by_branch, dense_tree_mask, tree_attention
from hfnoise.preference.tree_rows import TreeSegments, tree_row


def padded_rows(prompts, answers, left=False):
    """Return ids, attention mask and completion mask of rows `prompt + answer`; `answers[branch][prompt]`."""
    rows = [(prompt, own) for branch in answers for prompt, own in zip(prompts, branch, strict=True)]
    width = max(len(prompt) + len(own) for prompt, own in rows)
    ids, mask, completion = torch.zeros(3, len(rows), width, dtype=torch.long)
    for number, (prompt, own) in enumerate(rows):
        length = len(prompt) + len(own)
        start = width - length if left else 0
        ids[number, start : start + length] = torch.tensor([*prompt, *own])
        mask[number, start : start + length] = 1
        completion[number, start + len(prompt) : start + length] = 1
    return ids, mask, completion


# Few distinct tokens, so that answers often agree with each other at their heads.
TOKENS = st.integers(1, 3)


@st.composite
def batches(draw):
    branches = draw(st.integers(1, 4))
    prompts = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=3))
    answers = [[draw(st.lists(TOKENS, min_size=1, max_size=5)) for _ in prompts] for _ in range(branches)]
    return branches, prompts, answers


@settings(max_examples=60)
@given(batches(), st.booleans())
def test_every_label_sees_its_own_row_up_to_it(batch, left):
    branches, prompts, answers = batch
    ids, mask, completion = padded_rows(prompts, answers, left)
    row = tree_row(ids, mask, completion, branches)
    labels = ids.masked_fill(completion == 0, -100)[:, 1:]
    assert torch.equal(row.padded(row.shift_labels), labels.clamp(min=0))
    assert row.input_ids.shape == row.position_ids.shape == row.shift_labels.shape == (1, row.segments.tokens)
    seen = dense_tree_mask(row.segments)[0, 0]
    for place, target in zip(row.scored.tolist(), row.targets.tolist(), strict=True):
        padded_row, column = divmod(target, ids.size(1) - 1)
        first = int(mask[padded_row].argmax())
        assert row.input_ids[0, seen[place]].tolist() == ids[padded_row, first : column + 1].tolist()
        assert row.position_ids[0, seen[place]].tolist() == list(range(column + 1 - first))


def test_a_prompt_is_there_once():
    ids, mask, completion = padded_rows([[5, 6, 7, 8]], [[[1, 2, 3]], [[4]], [[1, 3]], [[2, 2]]])
    row = tree_row(ids, mask, completion, 4)
    assert row.segments == TreeSegments((3,), ((3, 1, 2, 2),))
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 1, 2, 8, 8, 1, 8, 2]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3, 3, 4, 3, 4]]
    assert row.shift_labels.tolist() == [[-100, -100, -100, 1, 2, 3, 4, 1, 3, 2, 2]]


def test_branches_may_have_prompt_tokens_of_their_own():
    ids, mask, completion = padded_rows([[5, 6]], [[[1, 2, 3]], [[4, 2]]])
    completion[:, 2] = 0  # 1 and 4: unscored, and not shared
    row = tree_row(ids, mask, completion, 2)
    assert row.segments == TreeSegments((1,), ((3, 2),))
    assert row.shift_labels.tolist() == [[-100, -100, 2, 3, -100, 2]]


@pytest.mark.parametrize("prompt", [[5], []])
def test_one_shared_token_is_no_prefix(prompt):
    ids, mask, completion = padded_rows([prompt], [[[1, 2, 3]], [[4, 2]]])
    row = tree_row(ids, mask, completion, 2)
    assert row.segments.prefixes == (0,) and sum(map(sum, row.segments.branches)) == int(mask.sum()) - 2


def test_gradients_come_back_through_the_scored_places_only():
    ids, mask, completion = padded_rows([[5, 6, 7]], [[[1, 2]], [[4]]])
    row = tree_row(ids, mask, completion, 2)
    values = torch.ones(1, row.segments.tokens, requires_grad=True)
    row.padded(values).sum().backward()
    assert torch.equal(values.grad != 0, row.shift_labels != -100)


def test_refused_rows():
    ids, mask, completion = padded_rows([[5, 6]], [[[1, 2]], [[4, 2]]])
    with pytest.raises(ValueError, match="2 rows are no multiple of branches=3"):
        tree_row(ids, mask, completion, 3)
    mask[1, 1] = 0
    with pytest.raises(ValueError, match="padding between tokens"):
        tree_row(ids, mask, completion, 2)


SEGMENTS = {
    "ragged": TreeSegments((5, 3), ((7, 2), (4, 1))),
    "four branches": TreeSegments((40,), ((70, 33, 5, 12),)),
    "no prefix": TreeSegments((0, 2), ((3, 4), (2, 2))),
    "an empty branch": TreeSegments((3, 0), ((0, 4), (0, 5))),
    "only a prefix": TreeSegments((3,), ((0, 0),)),
}


def outputs_and_gradients(attention, states, gradient):
    output = attention(*states)
    return [output, *torch.autograd.grad(output, states, gradient)]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("attention", [tree_attention, attention_by_branch])
def test_attention_and_gradients_equal_the_dense_mask(attention, segments, key_heads):
    torch.manual_seed(0)
    # Tokens before heads in memory, as in transformers.
    states = [
        torch.randn(1, segments.tokens, heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for heads in (4, key_heads, key_heads)
    ]
    gradient = torch.randn(1, 4, segments.tokens, 8, dtype=torch.float64)
    mask = dense_tree_mask(segments)

    def dense(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4, enable_gqa=True)

    expected = outputs_and_gradients(dense, states, gradient)
    found = outputs_and_gradients(lambda *states: attention(*states, segments, 0.4), states, gradient)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_half_precision_and_autocast():
    torch.manual_seed(0)
    segments = SEGMENTS["ragged"]
    states = torch.randn(3, 1, 4, segments.tokens, 8)
    exact = tree_attention(*states, segments, 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tree_attention(*states, segments, 0.4)
    assert mixed.dtype == torch.bfloat16
    # Twice the spacing of bfloat16: the two parts and their sum are rounded.
    torch.testing.assert_close(mixed.float(), exact, rtol=2**-7, atol=2**-6)
    assert torch.equal(mixed, tree_attention(*states.bfloat16(), segments, 0.4))


def test_values_of_another_width_take_the_general_way():
    torch.manual_seed(0)
    segments = SEGMENTS["ragged"]
    query, key = torch.randn(2, 1, 4, segments.tokens, 8)
    value = torch.randn(1, 4, segments.tokens, 6)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=dense_tree_mask(segments))
    torch.testing.assert_close(tree_attention(query, key, value, segments, 8**-0.5), expected)


def test_segments_of_another_row_are_refused():
    states = torch.randn(3, 1, 4, 9, 8)
    with pytest.raises(ValueError, match="describe 1 row of 19 tokens"):
        tree_attention(*states, TreeSegments((5, 3), ((7, 2), (1, 1))), 0.4)
