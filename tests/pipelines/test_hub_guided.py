"""Guided pipelines on the loopback Hub: one commit with a card; stock diffusers pulls a stock one, we a guided one."""

import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.hub, pytest.mark.slow]  # fresh processes that import all libraries

RUN = """
    import os, json, sys, torch
    torch.set_num_threads(1)
    from huggingface_hub import HfApi, ModelCard, hf_hub_download

    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe(["the digit seven"] * 2, num_inference_steps=4, output_type="latent", generator=generator).images

    def files(repo):
        return set(HfApi().list_repo_files(repo))
"""

PUSH = """
    import hfnoise
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    stock = new_digits_pipeline(width=8)
    torch.save(images(stock), "stock.pt")
    pipe = hfnoise.AdaptiveGuidancePipeline.from_pipe(stock, guider=hfnoise.AdaptiveGuidance(threshold=0.98))
    torch.save(images(pipe), "guided.pt")
    last_run = str(pipe.guidance_report)
    shas = [pipe.push_to_hub("digits").oid]
    pipe.save_pretrained("local", push_to_hub=True, repo_id="tester/again", commit_message="By save_pretrained")
    assert files("tester/digits") == files("tester/again") >= {"guider/guider_config.json", "README.md"}
    assert set(os.listdir("local")) >= {"guider", "README.md"}
    for repo in ("tester/digits", "tester/again"):
        card = ModelCard.load(repo)
        assert last_run in card.text
        assert f'AutoGuidedPipeline.from_pretrained("{repo}")' in card.text
        assert card.data.library_name == "diffusers"
        assert card.data.tags == ["diffusers", "hfnoise", "adaptive-guidance"]

    # A card written by hand stays, but for our section; a guider that is gone is deleted; every push is one commit.
    ModelCard("---\\nlicense: mit\\n---\\n\\n# Mine\\n\\nWords.\\n").push_to_hub("tester/digits")
    pipe.guider = hfnoise.AdaptiveGuidance(threshold=0.9)
    shas.append(pipe.push_to_hub("tester/digits").oid)
    card = ModelCard.load("tester/digits")
    assert "Words." in card.text and "| 0.9 |" in card.text and card.data.license == "mit"
    pipe.push_to_hub("tester/digits")
    assert ModelCard.load("tester/digits").text.count("## Guidance") == 1
    pipe.guider = None
    pipe.push_to_hub("tester/digits")
    card = ModelCard.load("tester/digits")
    assert "Words." in card.text and "Guidance" not in card.text and "hfnoise" not in str(card)
    assert not any(name.startswith("guider") for name in files("tester/digits"))
    json.dump(shas, open("shas.json", "w"))
    HfApi().create_branch("tester/digits", branch="first", revision=shas[0])

    guider = hfnoise.AdaptiveGuidance(threshold=0.97, inner=hfnoise.ProjectedGuidance())
    guider.push_to_hub("tester/guider")
    for load in (hfnoise.AdaptiveGuidance, hfnoise.AutoGuider):
        loaded = load.from_pretrained("tester/guider")
        assert loaded.threshold == 0.97 and type(loaded.inner) is hfnoise.ProjectedGuidance

    from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep
    modular = WanDenoiseStep().init_pipeline()
    modular.update_components(guider=guider)
    modular.save_pretrained("modular", push_to_hub=True, repo_id="tester/modular", overwrite_modular_index=True)
"""

STOCK = """
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("tester/again")
    assert type(pipe) is StableDiffusionPipeline and torch.equal(images(pipe), torch.load("stock.pt"))
    assert "hfnoise" not in sys.modules
"""

# The folder of the guider is not in the cache: stock diffusers did not download it.
WITHOUT_GUIDER_IN_CACHE = """
    import hfnoise
    try:
        hfnoise.AutoGuidedPipeline.from_pretrained("tester/again", local_files_only=True)
    except OSError as error:
        assert "guider/guider_config.json, which is not in the cache" in str(error), error
    else:
        raise SystemExit("loaded without the guider")
    own = hfnoise.AutoGuidedPipeline.from_pretrained(
        "tester/again", guider=hfnoise.AdaptiveGuidance(threshold=0.98), local_files_only=True
    )
    assert torch.equal(images(own), torch.load("guided.pt"))
"""

PULL = """
    import hfnoise

    guided = torch.load("guided.pt")
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained("tester/again", token="hf_x")
    assert torch.equal(images(pipe), guided) and pipe.guidance_report.saved > 0
    assert type(pipe) is hfnoise.GuidedStableDiffusionPipeline
    offline = hfnoise.GuidedStableDiffusionPipeline.from_pretrained("tester/again", local_files_only=True)
    assert torch.equal(images(offline), guided)

    # By commit and by branch, in a cache of its own; the guider is of the same commit.
    first, second = json.load(open("shas.json"))
    for revision, threshold in ((first, 0.98), (second, 0.9), ("first", 0.98)):
        at = hfnoise.AutoGuidedPipeline.from_pretrained("tester/digits", revision=revision, cache_dir="cache")
        assert at.guider.threshold == threshold
    assert os.path.isdir("cache/models--tester--digits")
    assert hfnoise.AutoGuidedPipeline.from_pretrained("tester/digits").guider is None
    again = hfnoise.AutoGuidedPipeline.from_pretrained("tester/digits", local_files_only=True)
    assert again.guider is None

    from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep
    index = json.load(open(hf_hub_download("tester/modular", "modular_model_index.json")))
    assert index["guider"][:2] == index["guider"][2]["type_hint"] == ["hfnoise", "AdaptiveGuidance"]
    modular = WanDenoiseStep().init_pipeline("tester/modular")
    modular.load_components()
    assert modular.guider.threshold == 0.97
"""

CUSTOM = """
    from diffusers import DiffusionPipeline
    import hfnoise

    HfApi().create_repo("tester/adaptive")
    HfApi().upload_folder(repo_id="tester/adaptive", folder_path=os.environ["CARD"])
    pipe = DiffusionPipeline.from_pretrained(
        "tester/again", custom_pipeline="tester/adaptive", trust_remote_code=True,
        guider=hfnoise.AdaptiveGuidance(threshold=0.98),
    )
    assert torch.equal(images(pipe), torch.load("guided.pt"))
"""


def test_pushed_once_and_pulled_by_both(hub, run_python):
    start = textwrap.dedent(RUN)
    card = Path(__file__).parents[2] / "model_cards" / "adaptive-guidance"
    # A process takes seconds to import diffusers. The second is stock until it imports hfnoise.
    for steps in ((PUSH,), (STOCK, WITHOUT_GUIDER_IN_CACHE, PULL, CUSTOM)):
        run_python(start + "".join(map(textwrap.dedent, steps)), {"CARD": str(card)})
    titles = [commit.title for commit in hub.repository("tester/again").history()]
    assert titles == ["By save_pretrained", "initial commit"]
    titles = [commit.title for commit in hub.repository("tester/digits").history()]
    pushed = "Upload StableDiffusionPipeline by hfnoise"
    # What is pushed again as it was makes no commit.
    assert titles == [pushed, pushed, "Upload README.md with huggingface_hub", pushed, "initial commit"]
