"""hfnoise in all states it is used in: wheel (built from the sdist), editable, strictly editable, bare checkout.

Nothing is downloaded: each environment is new and empty, and sees the packages of this one.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from hfnoise.methods import public_names

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PARTS = ("trainers", "pipelines", "model_cards", "benchmarks")
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "demo_output")
OFFLINE = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")

LIGHT_CHECK = """
import importlib.util, json
from importlib.resources import files
import hfnoise
from hfnoise.methods import public_names

def walk(folder, start=""):
    for entry in folder.iterdir():
        yield from walk(entry, f"{start}{entry.name}/") if entry.is_dir() else [start + entry.name]

modules = {*public_names().values(), "hfnoise.pipelines", "hfnoise.benchmarks"}
print(json.dumps({
    "lost": sorted(name for name in modules if importlib.util.find_spec(name) is None),
    "cards": [name for name in walk(files("hfnoise.model_cards")) if "__pycache__" not in name],
    "typed": (files("hfnoise") / "py.typed").is_file() and (files("hfnoise.benchmarks") / "published.json").is_file(),
    "home": hfnoise.__file__,
}))
"""
FULL_CHECK = """
import hfnoise
from hfnoise.methods import public_names

for name in public_names():
    getattr(hfnoise, name)
print(len(public_names()))
"""


def run(*command, cwd):
    """Run a command away from this checkout's PYTHONPATH; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def source_files(folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if "__pycache__" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Return a copy of the checkout, since a build writes into the folder that it builds."""
    copy = shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "checkout", ignore=NOT_SOURCE)
    # What Python leaves in a checkout that was used must not get into the archives.
    leftover = copy / "model_cards" / "__pycache__" / "leftover.pyc"
    leftover.parent.mkdir()
    leftover.touch()
    return copy


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    # What pip calls for a setup.py without a [build-system] table; pip itself has no command for it.
    hook = "import sys; from setuptools import build_meta; print(build_meta.__legacy__.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", hook, folder, cwd=checkout)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Return a wheel built from the sdist, so that a file that the sdist lacks is missed."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", folder, sdist, cwd=folder)
    return next(folder.iterdir())


@pytest.fixture
def environment(tmp_path):
    """Return the Python of an environment that holds nothing, and finds the packages of this one behind its own."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    outer = [path for path in sys.path if path.endswith("-packages")]
    (site_packages(python) / "outer.pth").write_text("\n".join(outer))
    return python


def site_packages(python):
    return next(python.parent.parent.rglob("site-packages"))


def install(python, *what):
    # This environment may hold hfnoise too; pip must not take that for the wanted one.
    run(python, "-m", "pip", "install", *OFFLINE, "--ignore-installed", *what, cwd=python.parent)


def check(python, checkout, cwd):
    """Check modules, package data and command line; return where hfnoise was found."""
    found = json.loads(run(python, "-c", LIGHT_CHECK, cwd=cwd))
    assert found["lost"] == []
    assert set(found["cards"]) == source_files(checkout / "model_cards")
    assert found["typed"]
    assert "robust-dpo" in run(python, "-m", "hfnoise", "list", cwd=cwd)
    return Path(found["home"])


def test_archives_hold_every_file_and_nothing_generic(checkout, sdist, wheel):
    wanted = {f"hfnoise/{name}" for name in source_files(checkout / "hfnoise")}
    wanted |= {f"hfnoise/{part}/{name}" for part in PARTS for name in source_files(checkout / part)}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == wanted
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    with tarfile.open(sdist) as archive:
        assert {"setup.py", "README.md", "LICENSE"} <= {name.split("/")[-1] for name in archive.getnames()}


def test_wheel(checkout, wheel, environment, tmp_path):
    install(environment, wheel)
    home = check(environment, checkout, tmp_path)
    assert home.is_relative_to(site_packages(environment))
    installed = {path.name.split("-")[0] for path in site_packages(environment).iterdir()}
    assert installed == {"hfnoise", "outer.pth"}
    assert run(environment, "-c", FULL_CHECK, cwd=tmp_path).split() == [str(len(public_names()))]
    assert "robust-dpo" in run(environment.parent / "hfnoise", "list", cwd=tmp_path)
    # In the checkout its own hfnoise/ comes first, and must still find trainers/.
    assert check(environment, checkout, checkout).is_relative_to(checkout)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable(mode, checkout, environment, tmp_path):
    install(environment, "--config-settings", f"editable_mode={mode}", "--editable", checkout)
    check(environment, checkout, tmp_path)
    check(environment, checkout, checkout)


def test_checkout_that_is_not_installed(checkout, environment):
    assert check(environment, checkout, checkout).is_relative_to(checkout)
