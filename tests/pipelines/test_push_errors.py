"""Networks, guiders and pipelines without network say where what they hold is; no test here needs a Hub."""

import pytest

import hfnoise
from hfnoise.errors import PushError
from hfnoise.hf_sharing import upload_command
from hfnoise.worlds.digits_pipeline import new_digits_pipeline


@pytest.fixture(scope="module")
def pipe():
    stock = new_digits_pipeline(width=8)
    return hfnoise.GuidedStableDiffusionPipeline.from_pipe(stock, guider=hfnoise.AdaptiveGuidance())


def test_parts(pipe):
    net = hfnoise.NoisePromptNet(encoder_hid_dim=64, pooled_dim=8, map_size=4, hidden_channels=8)
    for one in (net, pipe.guider, hfnoise.TimeFreeUNet2DConditionModel.from_config(pipe.unet.config)):
        with pytest.raises(
            PushError, match=f"^{type(one).__name__} was not pushed to me/part: .*offline mode"
        ) as found:
            one.push_to_hub("me/part")
        assert "call push_to_hub('me/part') again" in str(found.value)


def test_pipelines(pipe, tmp_path):
    with pytest.raises(PushError, match="StableDiffusionPipeline was not pushed to me/p: .*It is in memory"):
        pipe.push_to_hub("me/p")
    with pytest.raises(PushError, match="Nothing was written. To save it without a push"):
        pipe.save_pretrained(tmp_path / "pipe", push_to_hub=True, repo_id="me/p")
    assert not (tmp_path / "pipe").exists()


def test_a_module_is_not_pushed_without_its_options(pipe, tmp_path):
    step = hfnoise.OneMoreStep(hfnoise.TimeFreeUNet2DConditionModel.from_config(pipe.unet.config))
    with pytest.raises(ValueError, match="without its options. Save the folder and run `hf upload REPOSITORY"):
        step.save_pretrained(tmp_path / "step", push_to_hub=True)
    assert not (tmp_path / "step").exists()


def test_command():
    assert upload_command("me/x", "my pairs", repo_type="dataset", private=True, revision="v1", exclude=["a b"]) == (
        "hf upload me/x 'my pairs' . --repo-type dataset --revision v1 --private --exclude 'a b'"
    )
