"""The examples in docstrings run; `--doctest-modules` would import trainers/ under its bare name, which is refused."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"hfnoise": "hfnoise", "trainers": "hfnoise.trainers", "pipelines": "hfnoise.pipelines"}


def modules():
    """Return the names of all modules that may have examples."""
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(modules()))
def test_doctests(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where an example may write
    result = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples; see the output above"


def test_examples_are_found():
    assert doctest.testmod(import_module("hfnoise.methods")).attempted >= 4
