"""What a release promises beside its code: a changelog, tested floors, files for accelerate that it understands."""

import re
import runpy
from pathlib import Path

import pytest

import hfnoise

ROOT = Path(__file__).parent.parent
LAUNCHERS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## (\S+) \((\d{4}-\d{2}-\d{2})\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0][0] == hfnoise.__version__


def test_every_library_that_users_install_has_a_floor():
    floors = runpy.run_path(str(ROOT / ".ci" / "floors.py"))["floors"]()
    required = re.findall(r'^        "([\w-]+)>=', (ROOT / "setup.py").read_text(), re.M)
    assert len(required) > 10
    assert set(required) | {"bitsandbytes", "dp-accounting", "flwr", "scikit-learn"} == set(floors)


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda file: file.stem)
def test_accelerate_reads_its_files(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == (2 if file.stem.startswith("two_") else 8)
    # Users must know which of these were ever run.
    assert file.stem.startswith("two_") or "NOT RUN" in file.read_text()
