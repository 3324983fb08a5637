"""The guided class of any repository by its index, the two presets, and the names that diffusers resolves."""

import gc
import inspect
import json
import shutil
import warnings
import weakref
from pathlib import Path

import pytest
import torch

import hfnoise
from hfnoise.pipelines import AdaptiveGuidance, LinearGuidance, ProjectedGuidance
from hfnoise.worlds.digits_pipeline import new_digits_pipeline

CARDS = Path(__file__).parents[2] / "model_cards"
PRESETS = {"adaptive-guidance": AdaptiveGuidance, "projected-guidance": ProjectedGuidance}


def images(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 4, "output_type": "latent", "generator": generator, **options}
    return pipe("the digit seven", **call).images


@pytest.fixture(scope="module")
def linear_folder(stock_folder):
    """Return the same with a LinearGuidance saved."""
    folder = shutil.copytree(stock_folder, stock_folder.parent / "linear")
    LinearGuidance(5.0).save_pretrained(folder / "guider")
    return folder


def renamed(folder, target, name):
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text()) | {"_class_name": name}
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def test_stock_repository_becomes_guided(stock_folder):
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(stock_folder)
    assert type(pipe) is hfnoise.GuidedStableDiffusionPipeline and pipe.guider is None
    assert torch.equal(images(pipe), images(new_digits_pipeline(width=8)))
    guider = AdaptiveGuidance()
    assert hfnoise.AutoGuidedPipeline.from_pretrained(stock_folder, guider=guider).guider is guider


def test_arguments_reach_diffusers(stock_folder):
    scheduler = new_digits_pipeline(width=8).scheduler
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(stock_folder, scheduler=scheduler, dtype=torch.bfloat16)
    assert pipe.scheduler is scheduler and pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["AutoGuidedPipeline", "AdaptiveGuidancePipeline", "ProjectedGuidancePipeline"])
def test_not_made_directly(name):
    with pytest.raises(TypeError, match=f"{name} is not made; call {name}.from_pretrained"):
        getattr(hfnoise, name)()


def test_presets_set_their_guider(stock_folder):
    for preset, guider, options in (
        (hfnoise.AdaptiveGuidancePipeline, AdaptiveGuidance, {}),
        (hfnoise.ProjectedGuidancePipeline, ProjectedGuidance, {"norm_threshold": "auto", "momentum": -0.5}),
    ):
        for pipe in (preset.from_pretrained(stock_folder), preset.from_pipe(new_digits_pipeline(width=8))):
            assert type(pipe) is hfnoise.GuidedStableDiffusionPipeline
            assert type(pipe.guider) is guider and pipe.guider.config == guider(**options).config
        given = preset.from_pretrained(stock_folder, guider=guider(guidance_scale=3.0))
        assert given.guider.config == guider(guidance_scale=3.0).config


def test_preset_and_another_saved_guider(linear_folder):
    assert type(hfnoise.AutoGuidedPipeline.from_pretrained(linear_folder).guider) is LinearGuidance
    message = "linear has its own LinearGuidance; AdaptiveGuidancePipeline uses AdaptiveGuidance instead"
    with pytest.warns(UserWarning, match=message):
        pipe = hfnoise.AdaptiveGuidancePipeline.from_pretrained(linear_folder)
    assert type(pipe.guider) is AdaptiveGuidance
    with pytest.warns(UserWarning, match="StableDiffusionPipeline has its own LinearGuidance; Projected"):
        hfnoise.ProjectedGuidancePipeline.from_pipe(hfnoise.AutoGuidedPipeline.from_pretrained(linear_folder))


def test_preset_keeps_a_guider_of_its_class():
    guider = AdaptiveGuidance(threshold=0.9, inner=ProjectedGuidance())
    pipe = hfnoise.AutoGuidedPipeline.from_pipe(new_digits_pipeline(width=8), guider=guider)
    for preset in (hfnoise.AdaptiveGuidancePipeline, hfnoise.ProjectedGuidancePipeline):
        assert preset.from_pipe(pipe).guider is guider
        assert preset.from_pipe(new_digits_pipeline(width=8), guider=guider).guider is guider
    with pytest.raises(TypeError, match="ProjectedGuidancePipeline takes a ProjectedGuidance.*got LinearGuidance"):
        hfnoise.ProjectedGuidancePipeline.from_pipe(pipe, guider=LinearGuidance())


def test_unknown_class_is_refused(stock_folder, tmp_path):
    for number, name in enumerate(("TomorrowPipeline", "UNet2DConditionModel", "GuidedTomorrowPipeline")):
        folder = renamed(stock_folder, tmp_path / str(number), name)
        with pytest.raises(ValueError, match=f"is a {name}, and diffusers .* has no such pipeline"):
            hfnoise.AutoGuidedPipeline.from_pretrained(folder)
    with pytest.raises(OSError, match="model_index.json"):
        hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path)


def test_repository_that_names_our_class(stock_folder, tmp_path):
    import diffusers

    folder = renamed(stock_folder, tmp_path / "ours", "GuidedStableDiffusionPipeline")
    for load in (diffusers.DiffusionPipeline, hfnoise.AutoGuidedPipeline):
        assert type(load.from_pretrained(folder)) is hfnoise.GuidedStableDiffusionPipeline
    assert not hasattr(diffusers, "GuidedTomorrowPipeline") and not hasattr(diffusers, "AutoGuided")


def test_names_are_registered_as_strings():
    """What registration replaces in diffusers 0.42 is where it expects it."""
    import pickle

    import diffusers
    from diffusers.pipelines import pipeline_loading_utils as loading

    parts = {"UpdateGuidance", "NPNet", "NoisePromptNet", "OneMoreStep"}
    assert set(loading.LOADABLE_CLASSES["hfnoise"]) == parts
    for name, how in loading.LOADABLE_CLASSES["hfnoise"].items():
        assert loading.ALL_IMPORTABLE_CLASSES[name] == how == ["save_pretrained", "from_pretrained"]
    assert loading._fetch_class_library_tuple(AdaptiveGuidance()) == ("hfnoise", "AdaptiveGuidance")
    assert diffusers.GuidedFluxPipeline is hfnoise.GuidedFluxPipeline
    assert pickle.loads(pickle.dumps(diffusers)) is diffusers
    with pytest.raises(AttributeError, match="module diffusers has no attribute GuidedTomorrowPipeline"):
        _ = diffusers.GuidedTomorrowPipeline


def three_tasks(pipe):
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    image = torch.linspace(0, 1, 16 * 16).reshape(1, 1, 16, 16)
    yield pipe, {}
    pipe = hfnoise.guided_class(StableDiffusionImg2ImgPipeline).from_pipe(pipe)
    yield pipe, {"image": image, "strength": 1.0}
    pipe = hfnoise.guided_class(StableDiffusionInpaintPipeline).from_pipe(pipe)
    yield pipe, {"image": image, "mask_image": torch.ones(1, 1, 16, 16), "height": 16, "width": 16}


def test_from_pipe_across_tasks():
    start = hfnoise.AutoGuidedPipeline.from_pipe(new_digits_pipeline(width=8), guider=AdaptiveGuidance(threshold=0.98))
    start.vae.to(torch.bfloat16)
    for pipe, options in three_tasks(start):
        assert pipe.guider is start.guider and pipe.unet is start.unet
        assert pipe.unet.dtype == torch.float32 and pipe.vae.dtype == torch.bfloat16
        start.vae.float()
        images(pipe, **options)
        start.vae.to(torch.bfloat16)
        assert pipe.guidance_report.saved > 0
    assert hfnoise.GuidedStableDiffusionPipeline.from_pipe(pipe, dtype=torch.float32).vae.dtype == torch.float32


@pytest.mark.slow
def test_from_pipe_keeps_offload_hooks():
    from accelerate.hooks import CpuOffload

    stock = new_digits_pipeline(width=8)
    stock.enable_model_cpu_offload(device="cpu")
    hook = stock.unet._hf_hook
    start = hfnoise.AutoGuidedPipeline.from_pipe(stock, guider=AdaptiveGuidance(threshold=0.98))
    assert start._all_hooks is stock._all_hooks
    pipes = list(three_tasks(start))
    assert all(pipe.unet._hf_hook is hook for pipe, _ in pipes)
    for pipe, options in pipes:
        images(pipe, **options)  # puts new hooks on, as every call of a stock pipeline does
        assert pipe.guidance_report.saved > 0 and type(pipe.unet._hf_hook) is CpuOffload


@pytest.mark.slow  # they import every pipeline
def test_auto_pipelines_of_diffusers_refuse_rather_than_lose_the_guider():
    from diffusers import AutoPipelineForImage2Image

    pipe = hfnoise.AdaptiveGuidancePipeline.from_pipe(new_digits_pipeline(width=8))
    with pytest.raises(ValueError, match="can't find a pipeline linked to GuidedStableDiffusionPipeline"):
        AutoPipelineForImage2Image.from_pipe(pipe)


@pytest.mark.slow
def test_custom_pipelines(stock_folder, modules_cache):
    """Both in one process, though diffusers runs local folders in one module."""
    from diffusers import DiffusionPipeline

    stock_folder = str(stock_folder)
    for folder, guider in PRESETS.items():
        options = {"custom_pipeline": str(CARDS / folder), "trust_remote_code": True}
        pipe = DiffusionPipeline.from_pretrained(stock_folder, **options)
        assert type(pipe) is hfnoise.GuidedStableDiffusionPipeline and type(pipe.guider) is guider
        settings = {"norm_threshold": "auto", "momentum": -0.5} if guider is ProjectedGuidance else {}
        expected = hfnoise.AutoGuidedPipeline.from_pretrained(stock_folder, guider=guider(**settings))
        assert torch.equal(images(pipe), images(expected)) and pipe.config == expected.config
        given = DiffusionPipeline.from_pretrained(
            stock_folder, **options, guider=guider(3.0), scheduler=expected.scheduler
        )
        assert given.guider.guidance_scale == 3.0 and given.scheduler is expected.scheduler
        assert type(hfnoise.AutoGuidedPipeline.from_pretrained(stock_folder, **options).guider) is guider
    with pytest.raises(TypeError, match="is the class already"):
        hfnoise.GuidedStableDiffusionPipeline.from_pretrained(stock_folder, **options)


def test_classes_of_custom_pipelines_die():
    """diffusers makes such a class anew in every load: a server that loads again and again must not keep them."""
    from diffusers import StableDiffusionPipeline

    def live_and_die():
        mine = type("Mine", (StableDiffusionPipeline,), {})
        guided = hfnoise.guided_class(mine)
        assert hfnoise.guided_class(mine) is guided
        return weakref.ref(mine), weakref.ref(guided)

    watched = live_and_die()
    gc.collect()
    gc.collect()  # the second for the class that the first one has let go
    assert [one() for one in watched] == [None, None]


def test_custom_pipelines_are_not_made_directly():
    from hfnoise.pipelines.custom_pipelines import AdaptiveGuidanceCustomPipeline

    with pytest.raises(TypeError, match="use AdaptiveGuidancePipeline by itself"):
        AdaptiveGuidanceCustomPipeline()


def test_custom_pipeline_without_hfnoise_says_what_to_install():
    for folder in (*PRESETS, "one-more-step", "golden-noise"):
        code = (CARDS / folder / "pipeline.py").read_text().replace("hfnoise.pipelines", "hfnoise_missing.pipelines")
        with pytest.raises(ModuleNotFoundError, match="pip install hfnoise"):
            exec(code)


@pytest.mark.slow  # imports every pipeline
def test_custom_pipelines_know_every_component():
    import diffusers

    from hfnoise.pipelines.custom_pipelines import COMPONENTS
    from hfnoise.pipelines.pipeline_layouts import LAYOUTS

    guided = [name for name, layout in LAYOUTS.items() if layout.kind not in ("refused", "unguided")]
    found = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in guided:
            pipeline = getattr(diffusers, name)
            parameters = inspect.signature(pipeline.__init__).parameters.values()
            found |= {
                parameter.name
                for parameter in parameters
                if parameter.default is parameter.empty or parameter.name in pipeline._optional_components
            }
    assert found - {"self", "args", "kwargs", "guider"} == set(COMPONENTS)
