"""`save_pretrained(push_to_hub=True)` of nets and guiders: saved, then pushed with a card of ours, or explained."""

import errno
import textwrap

import pytest
from huggingface_hub import ModelCard

from hfnoise import AdaptiveGuidance
from hfnoise.errors import PushError
from hfnoise.hf_sharing import explained_push
from tests.hub.artefacts import new_npnet


@pytest.mark.parametrize("make", [new_npnet, AdaptiveGuidance])
def test_without_a_hub_it_is_saved_and_the_error_says_so(make, tmp_path):
    folder = tmp_path / "net"
    with pytest.raises(PushError, match="It is saved in .*Unset HF_HUB_OFFLINE and push again: run `hf upload me/net"):
        make().save_pretrained(folder, push_to_hub=True, repo_id="me/net")
    assert list(folder.glob("*config.json"))
    make().save_pretrained(tmp_path / "plain", push_to_hub=False)
    assert not (tmp_path / "plain" / "README.md").exists()


def test_a_full_disk_is_no_matter_of_the_hub():
    with (
        pytest.raises(PushError, match="Make room on the disk, and push again"),
        explained_push("x", "me/x", "", "so"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


PUSH = """
    from hfnoise import AdaptiveGuidance
    from tests.hub.artefacts import new_npnet

    new_npnet().save_pretrained("net", push_to_hub=True)
    guider = AdaptiveGuidance(threshold=0.9)
    guider.save_pretrained("guider", push_to_hub=True, repo_id="tester/g", commit_message="one")
"""


@pytest.mark.hub
@pytest.mark.soak
def test_what_is_pushed_has_a_card_of_ours(hub, run_python):
    run_python(textwrap.dedent(PUSH))
    for name, method in (("net", "golden-noise"), ("g", "adaptive-guidance")):
        card = ModelCard(hub.files(f"tester/{name}")["README.md"].decode())
        assert card.data.to_dict()["hfnoise"]["method"] == method, name
    assert hub.repository("tester/g").history()[0].title == "one"
