"""The golden guidance vectors (README.md beside them)."""

from pathlib import Path

import numpy
import pytest

from hfnoise.worlds.gaussian_mixture import GaussianMixture

FOLDER = Path(__file__).parent.parent / "vectors" / "guidance"


@pytest.fixture(scope="session")
def guidance_vectors():
    """Return a function that loads a file of golden guidance vectors by name."""
    return lambda name: dict(numpy.load(FOLDER / f"dev_{name}.npz"))


@pytest.fixture(scope="session")
def mixture(guidance_vectors):
    return GaussianMixture(guidance_vectors("gmm_ref"))
