"""The golden accounting vectors: dp-accounting 0.6.0 with its default grid (the calibration with 1e-3)."""

from functools import cache
from pathlib import Path

import numpy

FOLDER = Path(__file__).parent.parent / "vectors" / "privacy"


@cache
def accounting_vectors():
    """Return the arrays of dev_accounting.npz by name."""
    with numpy.load(FOLDER / "dev_accounting.npz") as archive:
        return dict(archive)
