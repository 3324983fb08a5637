"""Clients out of one dataset, and the classification task: who gets what, again and again the same."""

from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from hfnoise.worlds.expressions import KINDS, expression_texts
from hfnoise.worlds.federated import code_clients, dirichlet_split, split_by_column

LABELS = [k % 5 for k in range(600)]


@pytest.fixture(scope="module")
def rows():
    return Dataset.from_dict({"label": LABELS, "row": list(range(600)), "weight": [0.5] * 600})


def rows_of(parts):
    return {name: part["row"][:] for name, part in parts.items()}


def test_every_row_is_at_exactly_one_client(rows):
    parts = dirichlet_split(rows, clients=6, alpha=0.5, seed=3)
    assert list(parts) == [f"client_{k}" for k in range(6)]
    assert sorted(row for part in parts.values() for row in part["row"]) == list(range(600))


def test_the_seed_decides(rows):
    first = rows_of(dirichlet_split(rows, 6, seed=1))
    assert first == rows_of(dirichlet_split(rows, 6, seed=1))
    assert first != rows_of(dirichlet_split(rows, 6, seed=2))


def test_the_split_of_a_seed_is_pinned(rows):
    """Results that name a seed must stay what they are under other versions of numpy."""
    parts = dirichlet_split(rows, 3, seed=0)
    assert [len(part) for part in parts.values()] == [252, 63, 285]
    assert parts["client_0"]["row"][:3] == [72, 454, 249]


def skew(parts):
    """Return the mean distance of the clients' shares of labels from equal shares."""
    distances = []
    for part in parts.values():
        counts = Counter(part["label"])
        distances.append(sum(abs(counts[label] / len(part) - 0.2) for label in range(5)) / 2)
    return sum(distances) / len(distances)


def test_alpha_is_the_skew(rows):
    skews = [skew(dirichlet_split(rows, 6, alpha=alpha, seed=0)) for alpha in (0.1, 1.0, 1000.0)]
    assert skews[0] > skews[1] + 0.15 and skews[1] > skews[2] + 0.15 and skews[2] < 0.05


def test_strings_rows_in_random_order_and_tiny_alpha(rows):
    named = rows.map(lambda row: {"label": "abcde"[row["label"]]})
    assert rows_of(dirichlet_split(named, 4, seed=0)) == rows_of(dirichlet_split(rows, 4, seed=0))
    labels = dirichlet_split(rows, 2, alpha=100.0)["client_0"]["label"][:]
    assert labels != sorted(labels)
    tiny = dirichlet_split(rows, 2, alpha=1e-300, seed=0)
    assert all(count == 120 for part in tiny.values() for count in Counter(part["label"]).values())


def test_min_rows_holds_and_draws_that_cannot_give_it_are_an_error(rows):
    assert min(map(len, dirichlet_split(rows, 6, alpha=0.1, seed=0).values())) < 40
    assert min(map(len, dirichlet_split(rows, 6, alpha=0.1, seed=0, min_rows=40).values())) >= 40
    with pytest.raises(ValueError, match="none of 200 draws with alpha=0.01.*at best the smallest had.*Raise alpha"):
        dirichlet_split(rows, 6, alpha=0.01, min_rows=90)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": 0}, "clients must be a whole number of at least 1, got 0"),
        ({"clients": True}, "clients must be a whole number"),
        ({"alpha": 0}, "alpha must be a number above 0, got 0"),
        ({"alpha": float("nan")}, "alpha must be a number above 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"clients": 601}, "need 601 rows, and there are 600"),
        ({"clients": 3, "min_rows": 201}, "need 603 rows"),
        ({"label_column": "class"}, "no column 'class'. The dataset has label, row, weight"),
        ({"label_column": "weight"}, "holds 0.5; whole numbers and strings are allowed"),
    ],
)
def test_bad_arguments(rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        dirichlet_split(rows, **{"clients": 6, **arguments})


def test_rows_without_a_label_and_other_datasets_are_refused(rows):
    with pytest.raises(ValueError, match="'label' holds None.*Drop rows without a value"):
        dirichlet_split(Dataset.from_dict({"label": [0, None]}), 1)
    for other in (DatasetDict({"train": rows}), rows.to_iterable_dataset()):
        with pytest.raises(TypeError, match="must be a datasets.Dataset, got"):
            split_by_column(other, "label")


def test_values_of_a_column_stay_together():
    rows = Dataset.from_dict({"author": list("abacabadae"), "row": list(range(10))})
    alone = split_by_column(rows, "author")
    assert {name: len(part) for name, part in alone.items()} == {"a": 5, "b": 2, "c": 1, "d": 1, "e": 1}
    assert alone["a"]["row"][:] == [0, 2, 4, 6, 8]
    shared = split_by_column(rows, "author", clients=2)
    assert {name: sorted(set(part["author"])) for name, part in shared.items()} == {"a": ["a"], "b+3": list("bcde")}
    with pytest.raises(ValueError, match="clients=6 is more than the 5 values of 'author'"):
        split_by_column(rows, "author", clients=6)


@pytest.mark.slow
def test_code_clients_own_packages():
    clients = code_clients(5, rows_per_client=300)
    assert [len(part) for part in clients.values()] == [300] * 5
    packages = [set(part["package"]) for part in clients.values()]
    assert not set.intersection(*packages) and sum(map(len, packages)) == len(set.union(*packages))
    for part in clients.values():
        assert all(row["module"].split(".")[0] == row["package"] for row in part)
    with pytest.raises(
        ValueError, match="rows_per_client=1000000 is more than the [0-9]{4} rows of the smallest of 5"
    ):
        code_clients(5, rows_per_client=10**6)


def test_expressions_have_equal_shares_and_are_nested():
    expressions = expression_texts("train", 200)
    assert Counter(expressions["label"]) == dict.fromkeys(range(5), 40)
    assert expressions.features["label"].names == list(KINDS)
    assert expression_texts("train", 50).to_list() == expressions.select(range(50)).to_list()
    assert len(set(expressions["text"])) == 200
    assert all(12 <= len(text.encode()) <= 64 for text in expressions["text"])
    assert not set(expressions["text"]) & set(expression_texts("validation", 200)["text"])


def test_expressions_stand_where_the_label_says():
    from hfnoise.worlds.standard_library import standard_library_functions

    code = " ".join(" ".join(document.text.split()) for document in standard_library_functions())
    before = {0: ("if ", "elif ", "while "), 1: ("= ",), 2: ("return ",), 3: ("raise ",)}
    for row in expression_texts("train", 50):
        text = " ".join(row["text"].split())
        assert any(start + text in code or f"{start}({text}" in code for start in before.get(row["label"], ("",)))


@pytest.mark.parametrize("size", [0, 7, True, 5.0])
def test_bad_sizes_of_expressions(size):
    with pytest.raises(ValueError, match="size must be a multiple of 5"):
        expression_texts("train", size)


def test_bad_split_of_expressions():
    with pytest.raises(ValueError, match="split must be one of train, validation, got 'test'"):
        expression_texts("test")


@pytest.mark.slow
def test_all_expressions():
    """A text is in one split, and what is too much is refused with the number there is."""
    train, validation = expression_texts("train"), expression_texts("validation")
    assert len(train) > 8000 and len(validation) > 2000
    assert not set(train["text"]) & set(validation["text"])
    with pytest.raises(ValueError, match=f"size=1000000 is more than the {len(train)} train rows"):
        expression_texts("train", 10**6)
