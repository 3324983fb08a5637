"""The golden accounting vectors; where they come from stands in tests/vectors/privacy/README.md."""

from functools import cache
from pathlib import Path

import numpy

FOLDER = Path(__file__).parent.parent / "vectors" / "privacy"


@cache
def accounting_vectors():
    """Return the arrays of dev_accounting.npz by name."""
    with numpy.load(FOLDER / "dev_accounting.npz") as archive:
        return dict(archive)
