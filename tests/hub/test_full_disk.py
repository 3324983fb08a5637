"""A full disk in the middle of a save leaves the earlier save; in the middle of a pull, nothing that loads."""

import json
import sys

import pytest

pytestmark = [
    pytest.mark.hub,
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes"),
]
QUIET = {"HFNOISE_KERNELS": "0"}


def test_save_over_an_earlier_one(run_python, tiny_model_path):
    found = run_python("from tests.hub.full_disk import save; save()", {"MODEL": tiny_model_path, **QUIET})
    found = json.loads(found.splitlines()[-1])
    assert found.keys() == {"guided", "oms", "traces", "npd", "packed", "npnet"}
    for name, one in found.items():
        assert one["intact"] and one["new"], (name, one)
        assert "large" in one["said"], (name, one)  # "File too large": the limit of a file's size


def test_pull(hub, run_python):
    found = json.loads(run_python("from tests.hub.full_disk import pull; pull()", QUIET).splitlines()[-1])
    for name in ("npnet", "guided"):
        assert found[name]["whole"] is True, found
        assert len(found[name]["said"]) == 2 and all(found[name]["said"]), found
