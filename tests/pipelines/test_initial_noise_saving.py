"""What is in the slot `initial_noise` comes back with its pipeline to the bit; what cannot, is told."""

import json
import shutil

import diffusers
import pytest
import torch
from transformers import CLIPTextModelWithProjection

import hfnoise
from hfnoise.pipelines import BrightnessOffset, InitialNoise, OneMoreStep, initial_noise_files, saved_parts
from hfnoise.pipelines.guidance_card import guidance_card
from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from tests.pipelines.saved_noises import DIRECTION, LISTED, Mirrored, everything, guided, images, names, own_text, step
from tests.pipelines.test_noise_nets import NETS


class Dimmer(BrightnessOffset):
    pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with every member, and what that makes."""
    folder = tmp_path_factory.mktemp("saved") / "digits"
    pipe = guided(everything())
    made = images(pipe)
    pipe.save_pretrained(folder)
    return folder, made


def test_every_member_comes_back(saved):
    folder, made = saved
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(folder)
    assert torch.equal(images(pipe), made)
    assert [type(member).__name__ for member in pipe.initial_noise.members] == [
        "OneMoreStep", "TerminalPrior", "BrightnessOffset", "BrightnessOffset"
    ]  # fmt: skip
    assert pipe.initial_noise.members[3].direction == DIRECTION
    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert torch.equal(images(stock), images(new_digits_pipeline(width=8))) and not torch.equal(images(stock), made)


@pytest.mark.slow
def test_every_way_to_load(saved):
    folder, made = saved
    for load in (hfnoise.GuidedStableDiffusionPipeline, hfnoise.OneMoreStepPipeline):
        assert torch.equal(images(load.from_pretrained(folder)), made)
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(folder.parent, subfolder="digits")
    assert torch.equal(images(hfnoise.GuidedStableDiffusionPipeline.from_pipe(pipe)), made)
    assert torch.equal(images(hfnoise.OneMoreStepPipeline.from_pipe(pipe)), made)
    inpainting = hfnoise.GuidedStableDiffusionInpaintPipeline.from_pipe(pipe)
    assert inpainting.initial_noise is pipe.initial_noise
    with pytest.raises(ValueError, match=r"starts from an image .* without \(initial_noise=\[\]\)"):
        hfnoise.GuidedStableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert hfnoise.GuidedStableDiffusionImg2ImgPipeline.from_pipe(pipe, initial_noise=[]).initial_noise is None


def test_only_public_names_are_written(saved):
    folder, _ = saved
    config = json.loads((folder / LISTED).read_text())
    assert config["members"][0] == {"_class_name": "OneMoreStep", "subfolder": "oms_module"}
    assert config["members"][2] == {"_class_name": "BrightnessOffset", "value": 0.3, "direction": None}
    assert set(config) == {"members"} and "hfnoise" not in (folder / LISTED).read_text()
    assert "initial_noise" not in (folder / "model_index.json").read_text()


def test_table_is_of_public_classes():
    for name, folder in initial_noise_files.INITIAL_NOISES.items():
        member = getattr(hfnoise, name)
        assert issubclass(member, InitialNoise) and member.__name__ == name and member.subfolder == folder


@pytest.mark.slow
@pytest.mark.parametrize("new_net", NETS)
def test_every_class_of_the_table(tmp_path, new_net):
    others = [hfnoise.ConditioningNoise(0.5), hfnoise.SeedVariation(0.3, seed=1), hfnoise.ReDenoise(2)]
    chain = [*others, hfnoise.NoiseLevelGuidance(1), new_net(encoder_hid_dim=64), *everything()]
    shared = {"NPNet", "NoisePromptNet"} - {type(member).__name__ for member in chain}
    assert {type(member).__name__ for member in chain} == set(initial_noise_files.INITIAL_NOISES) - shared
    pipe = guided(chain)
    made = images(pipe)
    pipe.save_pretrained(tmp_path)
    again = hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert [type(member) for member in again.initial_noise.members] == [type(member) for member in chain]
    assert torch.equal(images(again), made)
    bare = hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path, dtype={"npnet": torch.bfloat16})
    assert bare.initial_noise.members[4].dtype == torch.bfloat16


@pytest.mark.slow
def test_lone_members(tmp_path):
    """One with weights is its sub-folder only, as before there was a list."""
    for number, (member, folder) in enumerate(
        ((step(), "oms_module"), ([step()], "oms_module"), (BrightnessOffset(0.3), "initial_noise"))
    ):
        pipe = guided(member)
        pipe.save_pretrained(tmp_path / str(number))
        ours = {path.split("/")[0] for path in names(tmp_path / str(number))} & {"oms_module", "initial_noise"}
        assert ours == {folder}
        again = hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path / str(number))
        assert not hasattr(again.initial_noise, "members") and torch.equal(images(again), images(pipe))


def test_two_members_of_one_folder_are_refused_before_anything_is_written(tmp_path):
    pipe = guided([step(), step()])
    with pytest.raises(
        ValueError, match="2 members whose weights go to oms_module/, and a repository has room for one"
    ):
        pipe.save_pretrained(tmp_path / "digits", push_to_hub=True)
    with pytest.raises(ValueError, match="2 members whose weights"):
        pipe.push_to_hub("digits")
    assert not (tmp_path / "digits").exists()


@pytest.mark.slow
def test_members_of_your_own_are_told_and_nothing_else_is_lost(tmp_path):
    pipe = guided([Mirrored(), Dimmer(0.5), BrightnessOffset(0.3)])
    with pytest.warns(
        UserWarning, match="Mirrored and Dimmer are not saved .* Saved without: BrightnessOffset."
    ) as told:
        pipe.save_pretrained(tmp_path)
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match=f"had Mirrored and Dimmer too, not saved in .*{LISTED}") as told:
        again = hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path)
    assert again.initial_noise.value == 0.3
    pipe.initial_noise = Dimmer(0.5)
    with pytest.warns(UserWarning, match=r"Dimmer is not saved with the pipeline: .* when it is loaded\.$"):
        pipe.save_pretrained(tmp_path)
    assert hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path).initial_noise is None
    assert not (tmp_path / "initial_noise").exists()


@pytest.mark.slow
def test_nothing_of_an_earlier_save_survives(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "digits")
    (folder / "oms_module" / "checkpoint-5").mkdir()
    (folder / "oms_module" / "checkpoint-5" / "model.safetensors").touch()
    pipe = guided([step(), BrightnessOffset(0.3)])
    pipe.save_pretrained(folder)
    assert not (folder / "oms_module" / "text_encoder").exists()
    assert torch.equal(images(hfnoise.AutoGuidedPipeline.from_pretrained(folder)), images(pipe))
    (folder / "oms_module" / "prompt_embeds.safetensors").touch()
    pipe.save_pretrained(folder)
    assert not (folder / "oms_module" / "prompt_embeds.safetensors").exists()
    pipe.initial_noise = BrightnessOffset(0.3)
    pipe.save_pretrained(folder)
    # Not in the way of a push either, whose patterns delete what is gone.
    assert "oms_module/*" in saved_parts.stale_patterns(folder, None)
    assert {path for path in names(folder) if path.startswith("oms")} == {"oms_module/checkpoint-5/model.safetensors"}
    assert torch.equal(images(hfnoise.AutoGuidedPipeline.from_pretrained(folder)), images(pipe))
    pipe.initial_noise = None
    pipe.save_pretrained(folder)
    assert not (folder / "initial_noise").exists()
    assert hfnoise.AutoGuidedPipeline.from_pretrained(folder).initial_noise is None


@pytest.mark.slow
def test_failure_leaves_what_was_there(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "digits")
    before = names(folder)
    with pytest.raises(TypeError, match="Identity cannot be saved"):
        guided([OneMoreStep(torch.nn.Identity()), BrightnessOffset(0.5)]).save_pretrained(folder)
    assert names(folder) == before
    assert torch.equal(images(hfnoise.AutoGuidedPipeline.from_pretrained(folder)), saved[1])


def test_pipeline_that_cannot_take_it(saved):
    load = hfnoise.GuidedStableDiffusionImg2ImgPipeline.from_pretrained
    with pytest.raises(ValueError, match=r"initial noise saved in .* cannot be used: .* Give initial_noise=\[\]"):
        load(saved[0])
    assert load(saved[0], initial_noise=[]).initial_noise is None


@pytest.mark.slow
def test_which_class_is_behind_a_folder(saved, monkeypatch, tmp_path):
    """Two may share one: the config says which."""

    class OneStepLess(OneMoreStep):
        @classmethod
        def from_pretrained(cls, path, subfolder, **options):
            return BrightnessOffset(0.5)

    monkeypatch.setitem(initial_noise_files.INITIAL_NOISES, "OneStepLess", "oms_module")
    monkeypatch.setattr(hfnoise, "OneStepLess", OneStepLess, raising=False)
    folder = shutil.copytree(saved[0], tmp_path / "digits")
    shutil.rmtree(folder / "initial_noise")
    assert type(hfnoise.AutoGuidedPipeline.from_pretrained(folder).initial_noise) is OneMoreStep
    config = folder / "oms_module" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "OneStepLess"}))
    assert type(hfnoise.AutoGuidedPipeline.from_pretrained(folder).initial_noise) is BrightnessOffset
    monkeypatch.setitem(initial_noise_files.INITIAL_NOISES, "OneStepLess", "unet")
    with pytest.raises(ValueError, match="holds oms_module and unet, and no .*config.json that says in which order"):
        hfnoise.AutoGuidedPipeline.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_reaches_the_weights(saved, dtype):
    expected = hfnoise.AutoGuidedPipeline.from_pretrained(saved[0]).to(dtype)
    expected.initial_noise.members[0].to(dtype)
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(saved[0], dtype=dtype)
    one = pipe.initial_noise.members[0]
    assert one.module.dtype == one.text_encoder.dtype == pipe.unet.dtype == dtype
    assert torch.equal(images(pipe), images(expected))


@pytest.mark.slow
def test_dtypes_by_part(saved):
    given = {"oms_module": torch.float32, "unet": torch.bfloat16, "default": torch.float16}
    for asked, found in (
        (given, torch.float32),
        ({"unet": torch.bfloat16, "default": torch.float16}, torch.float16),
        ({"unet": torch.bfloat16}, torch.float32),
    ):
        pipe = hfnoise.AutoGuidedPipeline.from_pretrained(saved[0], dtype=asked)
        one = pipe.initial_noise.members[0]
        assert one.module.dtype == one.text_encoder.dtype == found and pipe.unet.dtype == torch.bfloat16
    with pytest.warns(FutureWarning, match="`torch_dtype` is deprecated"):  # of diffusers, of its own parts
        pipe = hfnoise.GuidedStableDiffusionPipeline.from_pretrained(saved[0], torch_dtype=torch.bfloat16)
    assert pipe.initial_noise.members[0].module.dtype == torch.bfloat16
    kinds = {"dtype": torch.bfloat16, "oms_module": saved[0] / "oms_module"}
    assert hfnoise.OneMoreStepPipeline.from_pretrained(saved[0], **kinds).initial_noise.module.dtype == torch.bfloat16
    pipe = hfnoise.OneMoreStepPipeline.from_pipe(pipe, oms_module=saved[0])
    assert pipe.initial_noise.module.dtype == torch.bfloat16


@pytest.mark.slow
def test_variants_lie_side_by_side(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "digits")
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(folder).to(torch.bfloat16)
    pipe.initial_noise.members[0].to(torch.bfloat16)
    made = images(pipe)
    pipe.save_pretrained(folder, variant="bf16", max_shard_size="100KB")
    assert any(".bf16-0000" in name for name in names(folder / "oms_module"))
    pipe.save_pretrained(folder, variant="bf16")
    for part in ("oms_module/diffusion_pytorch_model", "oms_module/text_encoder/model"):
        files = {name for name in names(folder) if name.startswith(part)}
        assert files == {f"{part}.safetensors", f"{part}.bf16.safetensors"}
    again = hfnoise.AutoGuidedPipeline.from_pretrained(folder, variant="bf16", dtype=torch.bfloat16)
    assert torch.equal(images(again), made)
    # Without a dtype transformers takes that of the text encoder's config, in which the last save wrote bfloat16.
    full = hfnoise.AutoGuidedPipeline.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(images(full), saved[1])
    full = hfnoise.AutoGuidedPipeline.from_pretrained(folder)
    assert full.initial_noise.members[0].text_encoder.dtype == torch.float32
    # A part without the variant is loaded without, as those of diffusers are.
    for name in ("diffusion_pytorch_model.bf16.safetensors", "text_encoder/model.bf16.safetensors"):
        (folder / "oms_module" / name).unlink()
    hfnoise.AutoGuidedPipeline.from_pretrained(folder, variant="bf16")
    (folder / "oms_module" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        hfnoise.AutoGuidedPipeline.from_pretrained(folder, variant="bf16")


@pytest.mark.slow
def test_without_safetensors(tmp_path):
    pipe = guided([step(), BrightnessOffset(0.3)])
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "oms_module" / "diffusion_pytorch_model.bin").exists()
    assert torch.equal(images(hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path)), images(pipe))
    with pytest.raises(OSError, match="safetensors"):
        hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path, use_safetensors=True)


@pytest.mark.slow
def test_text_encoder_of_another_class(tmp_path):
    text = own_text(CLIPTextModelWithProjection)
    step(**text).save_pretrained(tmp_path)
    again = OneMoreStep.from_pretrained(tmp_path)
    tokens = torch.tensor([[1, 5, 3]])
    assert type(again.text_encoder) is CLIPTextModelWithProjection
    with torch.no_grad():
        assert torch.equal(again.text_encoder(tokens)[0], text["text_encoder"](tokens)[0])


@pytest.mark.slow
def test_custom_pipelines(saved, stock_folder, modules_cache):
    from tests.pipelines.test_auto_guided import CARDS

    options = {"custom_pipeline": str(CARDS / "one-more-step"), "trust_remote_code": True}
    load = diffusers.DiffusionPipeline.from_pretrained
    one = OneMoreStep.from_pretrained(saved[0])
    expected = images(guided(one))
    for given in ({"oms_module": str(saved[0])}, {"oms_module": one}, {"initial_noise": one}):
        pipe = load(stock_folder, **options, **given)
        assert type(pipe) is hfnoise.GuidedStableDiffusionPipeline and torch.equal(images(pipe), expected)
    half = load(stock_folder, **options, oms_module=str(saved[0]), dtype=torch.bfloat16)
    assert half.initial_noise.module.dtype == half.unet.dtype == torch.bfloat16
    guider = hfnoise.AdaptiveGuidance(threshold=0.98)
    assert load(stock_folder, **options, initial_noise=[one, Mirrored()][:1], guider=guider).guider is guider
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no oms_module. Give oms_module="):
        load(stock_folder, **options)
    # What is saved with the pipeline is seen by AutoGuidedPipeline, and does not go over what is given.
    assert torch.equal(images(hfnoise.AutoGuidedPipeline.from_pretrained(saved[0], **options)), saved[1])
    for given in ({"oms_module": one}, {"initial_noise": one}):
        assert hfnoise.AutoGuidedPipeline.from_pretrained(saved[0], **options, **given).initial_noise is one
    options["custom_pipeline"] = str(CARDS / "adaptive-guidance")
    assert load(stock_folder, **options, initial_noise=[one]).initial_noise.members == (one,)
    assert torch.equal(
        images(hfnoise.AutoGuidedPipeline.from_pretrained(saved[0], **options, guider=guider)),
        images(hfnoise.AutoGuidedPipeline.from_pretrained(saved[0], guider=guider)),
    )


def test_card_says_what_starts(saved):
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(saved[0])
    card = guidance_card(pipe, "someone/digits")
    assert "started by OneMoreStep ([paper](https://huggingface.co/papers/2311.15744)), TerminalPrior" in card.text
    assert "| OneMoreStep | `eta` | 0.25 |" in card.text and "| BrightnessOffset | `value` | 0.3 |" in card.text
    assert "| TerminalPrior | `statistics` | in `initial_noise/` |" in card.text and "Guidance" not in card.text
    assert "`initial_noise/` and `oms_module/` only hfnoise reads" in card.text
    assert card.data.tags == ["diffusers", "hfnoise", "one-more-step"] and "hu2024one" in card.text
    names = [type(member).__name__ for member in pipe.initial_noise.members]
    assert card.data.to_dict()["hfnoise"]["initial_noise"] == names
    pipe.guider, pipe.initial_noise = hfnoise.AdaptiveGuidance(), BrightnessOffset(0.5)
    card = guidance_card(pipe, "someone/digits")
    assert "guided by AdaptiveGuidance" in card.text and "started by BrightnessOffset of hfnoise" in card.text
    assert card.text.index("## Guidance") < card.text.index("## Initial noise") < card.text.index("from_pretrained")
    pipe.guider = None
    assert "bibtex" not in guidance_card(pipe, "someone/digits").text
