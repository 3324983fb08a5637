"""Golden vectors of the official code (README.md beside them)."""

import functools
from pathlib import Path

import numpy
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "vectors" / "quantization"
# The bfloat16 entries of the official Hadamard matrix, relative to exact ones.
CORRECTION = 2**-3.5 / 0.08837890625


@functools.cache
def load(name):
    return {key: torch.from_numpy(value) for key, value in numpy.load(FOLDER / f"dev_{name}.npz").items()}


@pytest.fixture(scope="session")
def vectors():
    """Return a function that loads a file of golden vectors by name, as tensors."""
    return load


@pytest.fixture(scope="session")
def correction():
    """Return a function of the name of an official quantiser: the factor that one application is off by."""

    def factor(name):
        return CORRECTION if name.startswith("half") else CORRECTION**2 if name.startswith("had") else 1.0

    return factor


@pytest.fixture(scope="session")
def official():
    """Return a function that maps the name of an official quantiser, such as `halfhadclip1.3_b2`, to our arguments."""

    def arguments(name):
        kind, bits = name.rsplit("_b", 1)
        found = {"bits": int(bits), "grid": "upstream", "hadamard_group": 128 if "had" in kind else None}
        if kind == "ste":
            return {**found, "estimator": "ste"}
        rule = kind.removeprefix("half").removeprefix("had")
        if rule.startswith("clip"):
            return {**found, "trust_factor": float(rule.removeprefix("clip"))}
        if rule == "trust":  # half a step; our default but at 1 bit
            return {**found, "trust_factor": 2.0 if bits == "1" else None}
        return {**found, "trust_radius": float(rule.removeprefix("trust"))}

    return arguments


def assert_close(found, expected):
    """Within 5e-6 of the largest magnitude, the margin the vectors were made for."""
    error = float((found.detach() - expected).abs().max() / expected.abs().max())
    assert error <= 5e-6


@pytest.fixture(scope="session")
def close():
    return assert_close
