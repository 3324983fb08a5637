"""Compiling the kernels into the cache folder, and doing without them: never silently, never with another result."""

import os
import re
import subprocess
import sys

import pytest
import torch

from hfnoise.quantization.kernels import __main__ as command
from hfnoise.quantization.kernels import building, integer_product, prepare_weight, route_for, selection
from hfnoise.quantization.kernels.library import LEVELS, load
from hfnoise.quantization.packing import pack

try:
    building.find_compiler()
    REASON = ""
except building.BuildError as error:
    REASON = str(error)
needs_compiler = pytest.mark.skipif(bool(REASON), reason=REASON)
# The interface of another version; compiled in no time, where the kernels take two seconds.
OTHER_VERSION = """
#define PUBLIC extern "C" __attribute__((visibility("default"))) int
PUBLIC hfnoise_bit_planes_version() { return 99; }
PUBLIC hfnoise_best_level() { return 0; }
PUBLIC hfnoise_weight_planes() { return 0; }
PUBLIC hfnoise_bit_plane_product() { return 0; }
PUBLIC hfnoise_quantize_rows() { return 0; }
PUBLIC hfnoise_rotate_gradients() { return 0; }
PUBLIC hfnoise_decode_rows() { return 0; }
PUBLIC hfnoise_scale_sums() { return 0; }
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Forget what was found out about this machine, before and after; compile into a folder of the test's own."""
    selection._load.cache_clear()
    for name in ("CXX", selection.SWITCH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    yield
    selection._load.cache_clear()


@pytest.fixture
def quick_source(monkeypatch, tmp_path):
    """Compile another source."""
    source = tmp_path / "other.cpp"
    source.write_text(OTHER_VERSION)
    monkeypatch.setattr(building, "SOURCES", (source,))
    return source


def product_of_ones():
    codes = torch.ones(2, 20, dtype=torch.uint8)
    return integer_product(codes, prepare_weight(pack(codes, 1), 1, 1, 20), 1, 1).tolist()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CXX", "no-such-compiler", "CXX is 'no-such-compiler', which is not found"),
        ("CXX", f"{sys.executable} -c raise(SystemExit(3))", "failed with exit status 3"),
        ("PATH", "", r"no C\+\+ compiler found"),
    ],
)
def test_without_a_compiler_torch_does_it_and_says_so(name, value, reason, monkeypatch, caplog):
    monkeypatch.setenv(name, value)
    for _ in range(2):
        found = selection.status()
        assert (found.compiled, found.level) == (False, None)
        assert re.search(reason, found.reason)
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
    assert re.search(reason, caplog.text)
    assert route_for(1, 1) != "bit_planes"
    assert product_of_ones() == [[20, 20], [20, 20]]


def test_switched_off_on_purpose(monkeypatch, caplog):
    monkeypatch.setenv(selection.SWITCH, "0")
    assert selection.status().reason == "switched off by HFNOISE_KERNELS=0"
    assert caplog.records == []
    assert product_of_ones() == [[20, 20], [20, 20]]


def test_an_unknown_switch_is_refused(monkeypatch):
    monkeypatch.setenv(selection.SWITCH, "sse")
    with pytest.raises(ValueError, match="HFNOISE_KERNELS is 'sse'; allowed are 0"):
        selection.status()


@needs_compiler
def test_another_version_is_not_used(quick_source, tmp_path):
    found = selection.status()
    assert not found.compiled
    assert "has version 99 of the interface" in found.reason
    # Only the library is left in the cache folder: what is being written has another name there.
    assert [path.suffix for path in building.cache_folder().iterdir()] == [".so"]
    assert product_of_ones() == [[20, 20], [20, 20]]


@needs_compiler
def test_compiled_once_per_source(quick_source):
    first = building.build()
    written = first.stat().st_mtime_ns
    assert building.build() == first
    assert first.stat().st_mtime_ns == written
    assert building.build(rebuild=True).stat().st_mtime_ns > written
    quick_source.write_text(OTHER_VERSION + "// changed\n")
    assert building.build() != first


@needs_compiler
def test_damaged_library(quick_source):
    building.build().write_bytes(b"not a library")
    assert "cannot be loaded" in selection.status().reason


@needs_compiler
def test_source_that_does_not_compile(quick_source, capsys):
    quick_source.write_text("no C++")
    assert "failed with exit status 1" in selection.status().reason
    assert list(building.cache_folder().iterdir()) == []
    assert command.main(["build"]) == 1
    assert "cannot be compiled" in capsys.readouterr().err
    assert command.main(["status"]) == 0
    assert capsys.readouterr().out.startswith("torch: ")


@needs_compiler
def test_code_of_others_is_not_run(quick_source):
    building.build().chmod(0o777)
    assert "can be written by other users" in selection.status().reason
    building.build(rebuild=True)
    building.cache_folder().chmod(0o777)
    with pytest.raises(building.BuildError, match="chmod go-w"):
        building.build()


def test_a_cache_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    found = selection.status()
    assert not found.compiled
    assert REASON or "cache folder cannot be used" in found.reason


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HOME": "/hub", "XDG_CACHE_HOME": "/cache"}, "/hub/hfnoise/kernels"),
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/huggingface/hfnoise/kernels"),
        ({}, os.path.expanduser("~/.cache/huggingface/hfnoise/kernels")),
    ],
)
def test_cache_folder(environment, folder):
    assert building.cache_folder(environment).as_posix() == folder


@needs_compiler
@pytest.mark.slow
def test_a_fresh_machine_compiles_by_itself(tmp_path):
    code = "from hfnoise.quantization.kernels import status; print(status())"
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "compiled=True" in done.stdout, done.stderr
    (library,) = building.cache_folder({"HF_HOME": str(tmp_path)}).iterdir()
    best = load(library).level
    assert [load(library, level).level for level in range(best + 1)] == list(range(best + 1))
    if best + 1 < len(LEVELS):
        with pytest.raises(ValueError, match="this machine has"):
            load(library, best + 1)
    # Compiled without warnings: what a compiler finds odd here, another may refuse.
    strict = [
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
        "-Werror",
        "-fsyntax-only",
    ]
    words = [*building.find_compiler(), "-std=c++17", *strict, *map(str, building.SOURCES)]
    assert subprocess.run(words, capture_output=True, text=True, check=False).stderr == ""
