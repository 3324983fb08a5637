"""CHES: the official values, masks instead of a side of padding, the sums, and the filter."""

import pytest
import torch
from datasets import Dataset, IterableDataset

from hfnoise.preference import ches_scores, filter_by_ches
from hfnoise.preference.ches import ches_from_sums, masked_sum


@pytest.fixture(scope="module")
def official(preference_vectors):
    """Return hidden states, masks and scores of the official function, which drops the last position of each row."""
    vectors = {name: torch.from_numpy(value) for name, value in preference_vectors("ches").items()}
    hidden, masks = [], []
    for answer in ("preferred", "dispreferred"):
        hidden.append(vectors[f"hidden_{answer}"])
        positions = torch.arange(hidden[-1].size(1))
        # The last token of the prompt predicts the first of the answer; the last token, EOS, predicts nothing.
        masks.append((positions >= vectors[f"last_prompt_idx_{answer}"][:, None]) & (positions < len(positions) - 1))
        assert torch.equal(masks[-1].sum(1), vectors[f"{answer}_len"])
    return hidden, masks, (vectors["ches"], vectors["ln_ches"])


def test_official_values(official):
    hidden, masks, expected = official
    scores = ches_scores(*hidden, *masks)
    assert scores[0].dtype == torch.float64 and scores[0].shape == (4,)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)
    in_float32 = ches_scores(*(states.float() for states in hidden), *masks)
    assert in_float32[0].dtype == torch.float32
    torch.testing.assert_close(tuple(score.double() for score in in_float32), expected, rtol=1e-3, atol=0)


def test_the_side_and_the_content_of_the_padding_do_not_matter(official):
    hidden, masks, expected = official
    moved_hidden, moved_masks = [], []
    for states, mask in zip(hidden, masks, strict=True):
        right = torch.full((4, 30, 16), float("nan"), dtype=torch.float64)
        right_mask = torch.zeros(4, 30, dtype=torch.long)
        for row in range(4):
            count = int(mask[row].sum())
            right[row, 2 : 2 + count] = states[row, mask[row]]
            right_mask[row, 2 : 2 + count] = 1
        moved_hidden.append(right)
        moved_masks.append(right_mask)
    torch.testing.assert_close(ches_scores(*moved_hidden, *moved_masks), expected, rtol=1e-10, atol=0)


def test_sums_give_the_same_scores(official):
    hidden, masks, expected = official
    sums = [part for states, mask in zip(hidden, masks, strict=True) for part in masked_sum(states, mask)]
    torch.testing.assert_close(ches_from_sums(*sums), expected, rtol=1e-10, atol=0)


def test_bfloat16_states_are_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    states = [(1 + torch.randn(2, 500, 8, generator=generator)).bfloat16() for _ in range(2)]
    ones = torch.ones(2, 500)
    exact = ches_scores(*(state.double() for state in states), ones, ones)
    scores = ches_scores(*states, ones, ones)
    assert scores[0].dtype == torch.float32
    torch.testing.assert_close(tuple(score.double() for score in scores), exact, rtol=1e-4, atol=0)
    # What it guards against: sums in bfloat16.
    chosen, rejected = (state.cumsum(1)[:, -1].double() for state in states)
    careless = (chosen * rejected).sum(1) - chosen.square().sum(1)
    assert ((careless - exact[0]) / exact[0]).abs().max() > 0.02


def test_bad_input_is_refused():
    states, ones = torch.zeros(2, 3, 4), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"chosen_hidden must be .* mask of \(2, 2\)"):
        ches_scores(states, states, ones[:, :2], ones)
    with pytest.raises(ValueError, match="rejected_hidden must be a floating tensor"):
        ches_scores(states, states.long(), ones, ones)
    with pytest.raises(ValueError, match="same shape"):
        ches_scores(states, torch.zeros(2, 3, 5), ones, ones)
    with pytest.raises(ValueError, match="same shape"):
        ches_scores(states, states[:1], ones, ones[:1])
    with pytest.raises(ValueError, match=r"rejected answers in rows \[1\] have no position"):
        ches_scores(states, states, ones, torch.tensor([[0, 0, 1], [0, 0, 0]]))


SCORES = [0.5, -1.0, 2.0, -1.0, -3.0, 0.0, 1.0, 4.0, 3.0, -1.0]


@pytest.fixture
def scored():
    return Dataset.from_dict({"row": list(range(10)), "ln_ches": SCORES, "ches": SCORES[::-1]})


@pytest.mark.parametrize(
    ("choice", "rows"),
    [
        ({}, [4]),  # 5 % of 10 pairs, at least one
        ({"keep": 0.3}, [1, 3, 4]),  # row 9 ties with 1 and 3
        ({"keep": 0.5}, [1, 3, 4, 5, 9]),
        ({"keep": 1}, list(range(10))),
        ({"max_score": -1.0}, [1, 3, 4, 9]),
        ({"keep": 0.2, "column": "ches"}, [0, 5]),
    ],
)
def test_filter_keeps_the_lowest_in_their_order(scored, choice, rows):
    assert filter_by_ches(scored, **choice)["row"][:] == rows


def test_filter_refuses(scored):
    for keep in (0, -0.1, 1.5, True, float("nan")):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            filter_by_ches(scored, keep=keep)
    with pytest.raises(ValueError, match="two ways"):
        filter_by_ches(scored, keep=0.1, max_score=0.0)
    with pytest.raises(ValueError, match="no column 'ln_ches'.*hfnoise.score_dataset"):
        filter_by_ches(scored.remove_columns("ln_ches"))
    with pytest.raises(ValueError, match="no pair has ln_ches <= -10: the lowest is -3"):
        filter_by_ches(scored, max_score=-10)
    with pytest.raises(ValueError, match="map-style"):
        filter_by_ches(IterableDataset.from_generator(lambda: iter([{"ln_ches": 1.0}])))
    for bad in (float("nan"), None):
        damaged = Dataset.from_dict({"ln_ches": [1.0, bad, 2.0]})
        with pytest.raises(ValueError, match=r"not finite in 1 of 3 rows \(\[1\]\)"):
            filter_by_ches(damaged)


def test_the_package_offers_all_three():
    import hfnoise
    from hfnoise.preference import score_dataset

    assert score_dataset is hfnoise.score_dataset and hfnoise.filter_by_ches is filter_by_ches
    with pytest.raises(AttributeError, match="score_datasets"):
        _ = hfnoise.preference.score_datasets
