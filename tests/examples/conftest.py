"""The Space, served as Hugging Face does it: `python app.py` in a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
_LONGEST_START = 120.0


@pytest.fixture(scope="module")
def space_url(tmp_path_factory):
    """Return the address of the app; its log is shown if it does not come up."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install 'hfnoise[space]'")
    log = tmp_path_factory.mktemp("space") / "log.txt"
    # Port 0 would be taken literally; Gradio looks for a free one from 7860 on when it is given none.
    settings = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "GRADIO_SERVER_NAME": "127.0.0.1"}
    kept = {name: value for name, value in os.environ.items() if name not in ("SPACE_ID", "GRADIO_SERVER_PORT")}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=SPACE, env=kept | settings, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        began, found = time.monotonic(), None
        while found is None and process.poll() is None and time.monotonic() - began < _LONGEST_START:
            time.sleep(0.2)
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text(encoding="utf-8"))
        assert found is not None, log.read_text(encoding="utf-8")
        yield found[0]
    finally:
        process.terminate()
        process.wait()
