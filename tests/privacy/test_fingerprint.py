"""The fingerprint follows the content, and nothing but the content."""

import datasets
import numpy
import pyarrow
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from hfnoise.privacy.hf_fingerprint import dataset_fingerprint

COUNT = 2500  # three batches
COLUMNS = {
    "text": [f"row {number} " * (number % 4) for number in range(COUNT)],
    "number": [None if number % 7 == 0 else number for number in range(COUNT)],
    "flag": [number % 3 == 0 for number in range(COUNT)],
    "tokens": [list(range(number % 5)) for number in range(COUNT)],
    "nested": [{"x": float(number), "y": [str(number)] * (number % 2)} for number in range(COUNT)],
}


@pytest.fixture(scope="module")
def dataset():
    return Dataset.from_dict(COLUMNS)


@pytest.fixture(scope="module")
def fingerprint(dataset):
    return dataset_fingerprint(dataset)


SAME = {
    "again": lambda rows, _: Dataset.from_dict(COLUMNS),
    "columns in another order": lambda rows, _: rows.select_columns(sorted(COLUMNS, reverse=True)),
    "chunks": lambda rows, _: datasets.concatenate_datasets(
        [rows.select(range(0, 3)), rows.select(range(3, 1801)), rows.select(range(1801, COUNT))]
    ),
    "slice of a larger one": lambda rows, _: datasets.concatenate_datasets([rows, rows]).select(
        range(COUNT, 2 * COUNT)
    ),
    "indices": lambda rows, _: rows.select(list(reversed(range(COUNT)))).select(list(reversed(range(COUNT)))),
    "flattened indices": lambda rows, _: rows.select(list(range(COUNT))).flatten_indices(),
    "format": lambda rows, _: rows.with_format("torch", columns=["number"]),
    "transform": lambda rows, _: rows.with_transform(lambda batch: {"x": [0] * len(batch["text"])}),
    "lambda, random _fingerprint": lambda rows, _: rows.map(lambda row: row, new_fingerprint="another"),
    "saved and loaded": lambda rows, folder: (
        rows.save_to_disk(folder, num_shards=3) or datasets.load_from_disk(str(folder))
    ),
    "in memory": lambda rows, folder: (
        rows.save_to_disk(folder) or datasets.load_from_disk(str(folder), keep_in_memory=True)
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_same_content_same_fingerprint(dataset, fingerprint, name, tmp_path):
    other = SAME[name](dataset, tmp_path / "saved")
    assert dataset_fingerprint(other) == fingerprint


OTHER = {
    "one value": lambda rows: Dataset.from_dict(COLUMNS | {"flag": [*COLUMNS["flag"][:-1], not COLUMNS["flag"][-1]]}),
    "null for zero": lambda rows: Dataset.from_dict(COLUMNS | {"number": [n or 0 for n in COLUMNS["number"]]}),
    "one row less": lambda rows: rows.select(range(COUNT - 1)),
    "other order": lambda rows: rows.select([1, 0, *range(2, COUNT)]),
    "one column less": lambda rows: rows.remove_columns("flag"),
    "other name": lambda rows: rows.rename_column("flag", "flags"),
    "other type": lambda rows: rows.cast_column("number", Value("int32")),
    "lists with another border": lambda rows: Dataset.from_dict(
        COLUMNS | {"tokens": [[0], [0, 0], [1], *COLUMNS["tokens"][3:]]}
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_content_other_fingerprint(dataset, fingerprint, name):
    assert dataset_fingerprint(OTHER[name](dataset)) != fingerprint


def test_it_is_what_it_was():
    # A ledger must still know its dataset in the next release: if this changes, all ledgers are lost.
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["no", "yes"]), "ids": Sequence(Value("int64"))}
    )
    rows = Dataset.from_dict({"text": ["a", None], "label": [0, 1], "ids": [[1], []]}, features=features)
    assert dataset_fingerprint(rows) == "sha256:6fc403bcb307e59230fe5e6b9c8fbc782a4a777c13ead00a8dd9c3c3df014259"
    assert (
        dataset_fingerprint([{"text": "a", "label": 0}])
        == "sha256:4491ca9288d14b12b626715450761c4ca6ed9be030ca66f3e81f91c64eb5f206"
    )


def test_memory_under_nulls_does_not_count():
    validity = pyarrow.py_buffer(bytes([0b101]))
    tables = [
        pyarrow.table(
            {
                "x": pyarrow.Array.from_buffers(
                    pyarrow.int64(), 3, [validity, pyarrow.py_buffer(numpy.array([1, hidden, 3]))]
                )
            }
        )
        for hidden in (0, 77)
    ]
    one, other = (dataset_fingerprint(Dataset(table)) for table in tables)
    assert one == other != dataset_fingerprint(Dataset.from_dict({"x": [1, 0, 3]}))


def test_empty_datasets_differ_from_others():
    assert dataset_fingerprint(Dataset.from_dict({"text": []})) != dataset_fingerprint(
        Dataset.from_dict({"text": ["a"]})
    )
    assert dataset_fingerprint([]) != dataset_fingerprint([{}])


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


ROW = {
    "text": "a", "raw": b"a", "ids": torch.tensor([1, 2]), "half": torch.ones(2, dtype=torch.bfloat16), "no": None,
    "array": numpy.array([[1.0, 2.0]]), "number": 1, "share": 0.5, "pair": ("a", ["b"]), "empty": torch.zeros(0),
}  # fmt: skip


def test_rows_of_other_datasets():
    fingerprint = dataset_fingerprint([ROW, ROW])
    assert dataset_fingerprint(Rows([dict(reversed(ROW.items()))] * 2)) == fingerprint
    strided = ROW | {"ids": torch.tensor([[1, 9], [2, 9]])[:, 0]}
    assert dataset_fingerprint([strided, ROW]) == fingerprint


@pytest.mark.parametrize(
    "change",
    [{"text": b"a"}, {"ids": torch.tensor([1, 3])}, {"ids": torch.tensor([[1, 2]])}, {"ids": torch.tensor([1.0, 2.0])},
     {"number": True}, {"number": 1.0}, {"no": "None"}, {"pair": ("ab", [])}, {"array": numpy.array([1.0, 2.0])}],
)  # fmt: skip
def test_every_part_of_a_row_counts(change):
    assert dataset_fingerprint([ROW | change]) != dataset_fingerprint([ROW])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield {}


@pytest.mark.parametrize("stream", [Stream(), Dataset.from_dict({"a": [1]}).to_iterable_dataset(), iter([])])
def test_streams_are_refused(stream):
    with pytest.raises(ValueError, match="no length .* guarantee of Poisson sampling would be lost; use a map-style"):
        dataset_fingerprint(stream)


def test_what_cannot_be_hashed_is_refused(dataset):
    with pytest.raises(TypeError, match="give one split"):
        dataset_fingerprint(datasets.DatasetDict(train=dataset))
    with pytest.raises(TypeError, match="a row of the dataset holds a object, of which no fingerprint"):
        dataset_fingerprint([{"x": object()}])
    with pytest.raises(TypeError, match="holds a ndarray"):
        dataset_fingerprint([{"x": numpy.array([object()])}])
