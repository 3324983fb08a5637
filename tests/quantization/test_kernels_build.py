"""Compiling the kernels into the cache folder, and doing without them: never silently, never with another result."""

import os
import subprocess
import sys

import pytest
import torch

from hfnoise.quantization.kernels import __main__ as command
from hfnoise.quantization.kernels import building, integer_product, prepare_weight, route_for, selection
from hfnoise.quantization.kernels.library import load
from hfnoise.quantization.packing import pack

try:
    building.find_compiler()
    REASON = ""
except building.BuildError as error:
    REASON = str(error)
needs_compiler = pytest.mark.skipif(bool(REASON), reason=REASON)
# Compiles a function, not the kernels, which take two seconds.
QUICK = "extern \"C\" int hfnoise_bit_planes_version() { return 99; }\n"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Forget what was found out about this machine, before and after; compile to a folder of the test's own."""
    selection._load.cache_clear()
    for name in ("CXX", selection.SWITCH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    yield
    selection._load.cache_clear()


def product_of_one_bit():
    """Return a product of all ones, 20 long, by the route that is chosen now."""
    codes = torch.ones(2, 20, dtype=torch.uint8)
    return integer_product(codes, prepare_weight(pack(codes, 1), 1, 1, 20), 1, 1).tolist()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CXX", "no-such-compiler", "CXX is 'no-such-compiler', which is not found"),
        ("CXX", sys.executable + " -c raise(SystemExit(3))", "failed with exit status 3"),
        ("PATH", "", "no C\\+\\+ compiler found"),
    ],
)
def test_without_a_compiler_torch_does_it_and_says_so(name, value, reason, monkeypatch, caplog):
    monkeypatch.setenv(name, value)
    found = selection.status()
    assert not found.compiled
    assert found.level is None
    assert selection.status() is not None
    with pytest.raises(AssertionError):
        assert found.reason == ""
    assert pytest.importorskip("re").search(reason, found.reason)
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
    assert route_for(1, 1) != "bit_planes"
    assert product_of_one_bit() == [[20, 20], [20, 20]]
