"""What `import hfnoise` costs, and what cannot be imported."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "numpy", "transformers", "trl", "diffusers", "datasets", "peft", "accelerate", "huggingface_hub"}


def loaded_by(code):
    """Return the seconds of CPU that `code` takes in a fresh process, and which heavy packages it loads."""
    program = (
        f"import json, sys, time; start = time.process_time(); {code}; seconds = time.process_time() - start; "
        "print(json.dumps([seconds, sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, packages = json.loads(done.stdout)
    return seconds, HEAVY.intersection(packages)


def test_import_is_light():
    # The faster of two: the first one may still read the files from disk.
    runs = [loaded_by("import hfnoise; dir(hfnoise)") for _ in range(2)]
    assert min(seconds for seconds, _ in runs) < 0.2
    assert runs[0][1] == set()


def test_core_needs_torch_only():
    _, packages = loaded_by("from hfnoise import pair_loss")
    assert packages - {"numpy"} == {"torch"}


@pytest.mark.parametrize("folder", ["trainers", "pipelines"])
def test_bare_folder_is_refused(folder):
    with pytest.raises(ImportError, match=f"import hfnoise.{folder} instead"):
        import_module(folder)
    assert import_module(f"hfnoise.{folder}").__name__ == f"hfnoise.{folder}"


@pytest.mark.parametrize("name", ["tests", "setup", "examples", "docs"])
def test_rest_of_the_checkout_is_no_part_of_the_package(name):
    with pytest.raises(ModuleNotFoundError, match=f"hfnoise.{name}"):
        import_module(f"hfnoise.{name}")
