"""Untrained pipelines: of digits, fresh for each test, and a tiny Stable Diffusion."""

import copy

import pytest

from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from hfnoise.worlds.tiny_pipelines import FAMILIES
from tests.pipelines.digits_calls import new_pipe


@pytest.fixture
def pipe(stock):
    """Return fresh modules of the same weights: what a test leaves on them is seen by it alone."""
    return copy.deepcopy(stock)


@pytest.fixture(scope="session")
def stock():
    return new_pipe()


@pytest.fixture(scope="module")
def sd():
    """Return a tiny Stable Diffusion pipeline."""
    return FAMILIES["sd-ddim"].build()


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    """Return where a stock pipeline of digits is saved."""
    folder = tmp_path_factory.mktemp("stock") / "digits"
    new_digits_pipeline(width=8).save_pretrained(folder)
    return folder


@pytest.fixture
def modules_cache(monkeypatch, tmp_path):
    """Keep the copies that diffusers makes of custom code out of the user's cache."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
