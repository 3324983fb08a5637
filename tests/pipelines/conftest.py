"""The untrained digits pipeline, fresh for each test."""

import copy

import pytest

from tests.pipelines.digits_calls import new_pipe


@pytest.fixture
def pipe(stock):
    """Return fresh modules of the same weights: what a test leaves on them is seen by it alone."""
    return copy.deepcopy(stock)


@pytest.fixture(scope="session")
def stock():
    return new_pipe()
