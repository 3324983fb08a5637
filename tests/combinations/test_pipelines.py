"""The matrix of pipelines: every pair of entries is in a cell that works, or is refused; the page says the same."""

from itertools import combinations
from pathlib import Path

import pytest

from hfnoise.worlds.tiny_pipelines import STOCK_WARNINGS
from tests.combinations.pipelines import (
    APART,
    BEGIN,
    COLUMNS,
    END,
    FAMILIES,
    REFUSALS,
    Cell,
    allowed,
    cells_of,
    entries_of,
    table,
)

pytestmark = [
    *(pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS),
    # Of diffusers and torch in what they do when they load and compile.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
# Quick ones, with as much in them as there can be; the others are for `make soak`.
SLOW = (
    Cell("sd-ddim", "Adaptive + Projected", "chain of nets", "W4A4", "none", "callback", "reloaded"),
    Cell("sdxl", "ProjectedGuidance", "ReDenoise", "W1 packed", "none", "images", "reloaded"),
    Cell("flux", "AdaptiveGuidance", "NoisePromptNet", "NF4", "LoRA", "generators", "preset"),
    Cell("pixart-alpha", "LinearGuidance", "chain", "float", "none", "decoded", "from_pipe"),
)
CELLS = [
    *(pytest.param(cell, marks=pytest.mark.slow, id=f"{cell}-quick") for cell in SLOW),
    *(pytest.param(cell, marks=pytest.mark.soak, id=str(cell)) for name in FAMILIES for cell in cells_of(name)),
]
REFUSED = [
    pytest.param(refusal, cell, marks=pytest.mark.soak, id=str(cell))
    for refusal in REFUSALS
    for cell in refusal.cells()
]


@pytest.fixture(autouse=True)
def fresh_dynamo(request):
    yield
    if "compiled" in request.node.name:
        import torch

        torch._dynamo.reset()


@pytest.mark.parametrize("cell", CELLS)
def test_cell(cell):
    from tests.combinations.pipeline_checks import check

    check(cell)


@pytest.mark.parametrize(("refusal", "cell"), REFUSED)
def test_refused(refusal, cell):
    from tests.combinations.pipeline_checks import attempt

    if refusal.warns:
        with pytest.warns(UserWarning, match=refusal.phrase):
            attempt(cell)
        return
    with pytest.raises((ValueError, TypeError), match=refusal.phrase):
        attempt(cell)


@pytest.mark.parametrize("what", [pytest.param(what, marks=pytest.mark.slow) for what in APART])
def test_apart(what):
    from tests.combinations.pipeline_checks import attempt_apart

    with pytest.raises((ValueError, TypeError, RuntimeError), match=APART[what]):
        attempt_apart(what)


def test_every_pair_is_in_a_cell_or_refused():
    for name in FAMILIES:
        entries, cells = entries_of(name), cells_of(name)
        for one, other in combinations(COLUMNS, 2):
            found = {(getattr(cell, one), getattr(cell, other)) for cell in cells}
            assert found == {
                (first, second)
                for first in entries[one]
                for second in entries[other]
                if allowed(name, {one: first, other: second})
            }


def test_the_page_is_of_this_data():
    """If it fails: python -m tests.combinations.pipelines"""
    assert PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip() == table().strip()
