"""A push that breaks leaves the old or the new on the Hub, never a part, and says what to do; the next goes through.

Of every kind that is pushed from the pipelines' side, by our code or by stock code on what is ours.
"""

import json
import textwrap

import pytest

pytestmark = [pytest.mark.hub, pytest.mark.soak]
QUIET = {"HFNOISE_KERNELS": "0"}


def test_pipelines_nets_guiders_and_datasets(hub, run_python, tiny_model_path):
    said = run_python("from tests.hub.broken_pushes import push; push()", {"MODEL": tiny_model_path, **QUIET})
    said = json.loads(said.splitlines()[-1])
    assert said.keys() == {"npnet", "oms-module", "guider", "guided", "saved"}
    assert "403 Forbidden from PUT /lfs/" in said["npnet"]["a large file is refused"]
    assert "HF_TOKEN" in said["guided"]["the commit is refused"]
    saved = said["saved"]["the Hub answers the commit with 500"]
    assert "It is saved in 'local'" in saved and "`hf upload tester/saved local .`" in saved
    assert "Nothing was written" in said["saved"]["the repository is refused"]
    found = run_python("from tests.hub.broken_pushes import pull; pull()", QUIET).splitlines()[-1]
    assert set(json.loads(found).values()) == {True}
    assert hub.unrouted == []
    # Each push of something new is one commit: the first, and the one whose answer was lost.
    for name in ("npnet", "oms-module", "guider", "guided", "saved"):
        assert len(hub.repository(f"tester/{name}").history()) == 3, name


LARGE_FOLDER = """
    from pathlib import Path
    from hfnoise.hf_sharing import upload_in_one_commit
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("tester/large")
    for number in range(300):
        path = Path("large") / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    upload_in_one_commit("tester/large", "large", "all", ignore_patterns=["part2/*"])
    upload_in_one_commit("tester/large", "large/part2", "below", path_in_repo="part0", delete_patterns=["3*"])
    try:
        upload_in_one_commit("tester/large", "large", "none", ignore_patterns=["*"])
    except ValueError as error:
        assert "holds no file to upload" in str(error)
    else:
        raise AssertionError("nothing is no upload")
"""


def test_a_folder_of_any_size_is_one_commit(hub, run_python):
    run_python(textwrap.dedent(LARGE_FOLDER))
    assert [commit.title for commit in hub.repository("tester/large").history()] == ["below", "all", "initial commit"]
    files = hub.files("tester/large")
    assert not any(name.startswith("part2") for name in files)
    assert "part0/2.txt" in files and "part1/1.txt" in files and "part0/0.txt" in files
    assert "part0/3.txt" not in files and "part1/31.txt" in files
