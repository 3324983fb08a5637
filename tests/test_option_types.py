"""What stock fields take in Python they take from YAML as well; numbers of numpy are numbers."""

from dataclasses import dataclass

import numpy
import pytest
from transformers import TrainingArguments

from hfnoise.option_types import check_option_types, wrong_type


@dataclass
class Options:
    on: bool = False
    rate: float = 0.1
    count: int = 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("debug", ["underflow_overflow"]), ("max_grad_norm", float("inf")), ("bf16", numpy.bool_(True))],
)
def test_what_stock_fields_take_is_not_refused(name, value):
    assert wrong_type(TrainingArguments, name, value) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("debug", ["underflow"]), ("max_grad_norm", float("nan")), ("bf16", numpy.float64(1.0))],
)
def test_what_they_do_not_take_is(name, value):
    assert name in wrong_type(TrainingArguments, name, value)


def test_numbers_of_numpy_become_those_of_python():
    options = Options(numpy.bool_(True), numpy.float32(0.5), numpy.int64(3))
    check_option_types(options, Options)
    assert (options.on, options.rate, options.count) == (True, 0.5, 3)
    assert [type(value) for value in vars(options).values()] == [bool, float, int]
    with pytest.raises(ValueError, match="rate must be a finite number, got inf"):
        check_option_types(Options(rate=float("inf")), Options)
