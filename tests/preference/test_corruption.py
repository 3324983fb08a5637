"""Label corruption: the rate, the independence of order, and bad input."""

import pytest
from datasets import Dataset, IterableDataset

from hfnoise.preference import flip_labels


@pytest.fixture(scope="module")
def pairs():
    rows = {"prompt": [f"p{i}" for i in range(2000)], "chosen": [f"good {i}" for i in range(2000)]}
    return Dataset.from_dict({**rows, "rejected": [f"bad {i}" for i in range(2000)]})


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.3, 0.45])
def test_share_of_flips(pairs, flip_rate):
    flipped = flip_labels(pairs, flip_rate, seed=1)
    share = sum(flipped["flipped"]) / len(flipped)
    # Four standard errors of a binomial share of 2000.
    assert share == pytest.approx(flip_rate, abs=4 * (flip_rate * (1 - flip_rate) / 2000) ** 0.5)
    for row in flipped.select(range(50)):
        assert row["chosen"].startswith("bad") == row["flipped"] == row["rejected"].startswith("good")


def test_flips_depend_on_the_example_and_not_on_its_place(pairs):
    whole = {row["prompt"]: row["flipped"] for row in flip_labels(pairs, 0.3, seed=0)}
    shuffled = flip_labels(pairs.shuffle(seed=5).select(range(500)), 0.3, seed=0)
    assert all(whole[row["prompt"]] == row["flipped"] for row in shuffled)


def test_flips_at_a_low_rate_stay_at_a_higher_one_and_change_with_the_seed(pairs):
    low, high = (flip_labels(pairs, rate, seed=0)["flipped"] for rate in (0.1, 0.3))
    assert all(not a or b for a, b in zip(low, high, strict=True))
    assert list(flip_labels(pairs, 0.3, seed=1)["flipped"]) != list(high)


def test_messages_streams_and_paired_columns():
    rows = [
        {
            "chosen": [{"role": "assistant", "content": f"good {i}"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
            "score_chosen": 1.0,
            "score_rejected": 0.0,
        }
        for i in range(100)
    ]
    stored = flip_labels(Dataset.from_list(rows), 0.3)
    streamed = list(flip_labels(IterableDataset.from_generator(lambda: iter(rows)), 0.3))
    assert list(stored["flipped"]) == [row["flipped"] for row in streamed]
    assert all((row["score_chosen"] == 0.0) == row["flipped"] for row in stored)


@pytest.mark.parametrize("flip_rate", [-0.1, 0.5, float("nan"), "0.3", None, True])
def test_rate_out_of_range(pairs, flip_rate):
    with pytest.raises(ValueError, match=r"flip_rate must be .*\[0, 0.5\)"):
        flip_labels(pairs, flip_rate)


def test_bad_datasets(pairs):
    with pytest.raises(ValueError, match="'rejected'.* missing"):
        flip_labels(pairs.remove_columns("rejected"), 0.1)
    with pytest.raises(ValueError, match="flipped before"):
        flip_labels(flip_labels(pairs, 0.1), 0.1)
