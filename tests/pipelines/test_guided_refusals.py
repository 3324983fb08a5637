"""What cannot be guided says so before the run; classes and slots of guided pipelines; modules as they are used."""

import inspect

import pytest
import torch

import hfnoise
from hfnoise.pipelines import AdaptiveGuidance, LinearGuidance, ProjectedGuidance, guide, guided_class
from hfnoise.pipelines.guider_checks import check_guider
from hfnoise.pipelines.module_calls import is_compiled
from hfnoise.pipelines.pipeline_layouts import LAYOUTS, PipelineLayout
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS
from tests.pipelines.digits_calls import guided, never, run

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]
slow = pytest.mark.slow


# Refusals. --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "guider", "error", "message"),
    [
        ("StableDiffusionSAGPipeline", never(), ValueError, "cannot take a guider"),
        ("LatentConsistencyModelPipeline", never(), ValueError, "has no unconditional prediction"),
        ("FluxFillPipeline", never(), ValueError, "has no unconditional prediction"),
        ("HunyuanImagePipeline", "adaptive", TypeError, "takes a guider of hfnoise or diffusers, got str"),
        ("StableDiffusionInstructPix2PixPipeline", ProjectedGuidance(), ValueError, "two guidance scales"),
        ("StableDiffusionInstructPix2PixPipeline", LinearGuidance(), ValueError, "two guidance scales"),
        ("LTXImageToVideoPipeline", AdaptiveGuidance(), ValueError, "x0 does not follow"),
        ("FluxPipeline", never(guidance_rescale=0.5), ValueError, "has no guidance_rescale"),
        ("StableDiffusionPipeline", never(use_original_formulation=True), ValueError, "guidance_scale larger by 1"),
        ("StableDiffusionPipeline", AdaptiveGuidance, TypeError, "takes a guider of hfnoise"),
        ("StableDiffusionPipeline", 7.5, TypeError, "takes a guider of hfnoise"),
        ("DiffusionPipeline", never(), ValueError, "it is not known how DiffusionPipeline calls its denoiser"),
    ],
)
def test_refused_when_it_is_given(name, guider, error, message):
    import diffusers

    with pytest.raises(error, match=message):
        check_guider(getattr(diffusers, name), guider)


def test_a_refusal_changes_nothing(pipe):
    before, kind = dict(pipe.__dict__), type(pipe)
    for wrong in (7.5, never(use_original_formulation=True)):
        with pytest.raises((TypeError, ValueError)), guide(pipe, wrong):
            raise AssertionError("it was taken")
    with pytest.raises(TypeError, match="initial_noise must be"), guide(pipe, never(), initial_noise=3):
        raise AssertionError("it was taken")
    assert type(pipe) is kind and pipe.__dict__ == before
    made = guided_class(kind).from_pipe(pipe, guider=never())
    guider = made.guider
    with pytest.raises(TypeError, match="got Linear"):
        made.guider = torch.nn.Linear(1, 1)
    assert made.guider is guider
    with pytest.raises(TypeError, match="guide takes a pipeline of diffusers, got int"), guide(3, never()):
        raise AssertionError("it was taken")


class NotTorch:
    """A denoiser as of ONNX: it is called, and is no module."""

    def __init__(self, unet):
        self.config, self.dtype, self._unet = unet.config, unet.dtype, unet

    def __call__(self, *args, **kwargs):
        return self._unet(*args, **kwargs)


def test_a_denoiser_that_is_no_module(pipe):
    unet = pipe.unet
    pipe.__dict__["unet"] = NotTorch(unet)
    pipe.register_modules = None
    with pytest.raises(TypeError, match="needs a torch module as unet"):
        guided(pipe, never())
    pipe.__dict__["unet"] = unet
    assert guided(pipe, never()).isfinite().all()


@slow
def test_wan_with_tokens_at_two_noise_levels():
    """Wan 2.2 TI2V with an image; without one all tokens are at one."""
    from hfnoise.worlds.tiny_pipelines import videos

    call = FAMILIES["wan-2.1"].call(1)
    shape = ("WanTransformer3DModel", videos._WAN)
    build = videos.transformer_pipeline
    pipe = build("WanImageToVideoPipeline", *shape, **videos._IMAGE_PARTS, expand_timesteps=True)()
    with guide(pipe, AdaptiveGuidance()), pytest.raises(ValueError, match="WanImageToVideoPipeline with expand_time"):
        pipe(**call, image=torch.rand(1, 3, 32, 32))
    pipe = build("WanPipeline", *shape, expand_timesteps=True)()
    guider = AdaptiveGuidance(threshold=1.0)
    with guide(pipe, guider):
        pipe(**call)
    assert guider.report.similarity.isfinite().all()


@slow
def test_linear_estimates_end_with_a_model():
    """Wan 2.2: what would be estimated from updates of the other transformer is evaluated instead."""
    family = FAMILIES["wan-2.2"]
    pipe = family.build()
    pipe.register_to_config(boundary_ratio=0.95)
    guider = LinearGuidance()
    with guide(pipe, guider):
        assert pipe(**family.call(1)).frames.isfinite().all()
    # Steps 1 and 3 would be estimates; the second transformer begins at one of them.
    assert guider.report.rows.count(2) == 3


# Community pipelines. ---------------------------------------------------------------------------------------------


def test_a_pipeline_of_the_community(pipe, monkeypatch):
    """It is not known until its layout is said."""
    from diffusers import DiffusionPipeline

    stock = type(pipe)

    class Community(DiffusionPipeline):
        __init__, __call__ = stock.__init__, stock.__call__

    for name in dir(stock):
        if not name.startswith("__") and name not in dir(DiffusionPipeline):
            setattr(Community, name, inspect.getattr_static(stock, name))
    expected = run(pipe)
    pipe.__class__ = Community
    with pytest.raises(ValueError, match=r"LAYOUTS\['Community'\] = PipelineLayout"):
        guided(pipe, never())
    monkeypatch.setitem(LAYOUTS, "Community", PipelineLayout("batched"))
    guider = AdaptiveGuidance(threshold=0.01, min_steps=0.0)
    assert torch.equal(guided(pipe, never()), expected)
    guided(pipe, guider)
    assert guider.report.rows == (4, 2, 2, 2) and type(pipe) is Community
    monkeypatch.setitem(LAYOUTS, "Community", PipelineLayout("batched", denoisers=("transformer",)))
    with pytest.raises(
        ValueError, match="Community has no transformer, which .* the names of what it does, of .* unet"
    ):
        guided(pipe, never())


# Classes. ---------------------------------------------------------------------------------------------------------


def test_guided_classes():
    from diffusers import StableDiffusionPipeline as Stock

    made = guided_class(Stock)
    assert made is guided_class(Stock) is guided_class(made) and issubclass(made, Stock)
    assert made is hfnoise.GuidedStableDiffusionPipeline
    assert made.__doc__ == Stock.__doc__
    # from_pipe and from_pretrained read these.
    for name in ("__init__", "__call__"):
        assert inspect.signature(getattr(made, name)) == inspect.signature(getattr(Stock, name))
        assert getattr(made, name).__annotations__ == getattr(Stock, name).__annotations__


def test_from_pipe_across_classes_keeps_everything(pipe):
    """The components, the slots, and dtypes that are not all the same."""
    import diffusers

    pipe.unet.to(torch.bfloat16)
    made = hfnoise.GuidedStableDiffusionPipeline.from_pipe(pipe, guider=never())
    other = hfnoise.GuidedStableDiffusionImg2ImgPipeline.from_pipe(made)
    assert isinstance(other, diffusers.StableDiffusionImg2ImgPipeline)
    for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        assert getattr(other, name) is getattr(made, name) is getattr(pipe, name)
    assert other.guider is made.guider
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    other = hfnoise.GuidedStableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=torch.float32)
    assert other.unet.dtype == torch.float32


def test_nested_blocks_put_back_what_was(pipe):
    kind, outer, inner = type(pipe), never(guidance_scale=3.0), never(guidance_scale=5.0)
    with guide(pipe, outer):
        with pytest.raises(KeyboardInterrupt), guide(pipe, inner):
            assert pipe.guider is inner
            raise KeyboardInterrupt
        assert pipe.guider is outer
        with guide(pipe):
            assert pipe.guider is None
    assert type(pipe) is kind and "_guider" not in pipe.__dict__


@slow
@pytest.mark.parametrize("before", ["stock", "ours"])
def test_modular_pipelines_get_their_guider_back(before):
    from diffusers import ClassifierFreeGuidance

    from tests.pipelines.modular import Loop

    own = ClassifierFreeGuidance(3.0) if before == "stock" else never(guidance_scale=3.0)
    loop = Loop("wan", own)
    expected = loop()
    guider = AdaptiveGuidance(5.0, threshold=0.01, min_steps=0.0)
    with pytest.raises(KeyboardInterrupt), guide(loop.pipe, guider):
        loop()
        assert len(guider.report.rows) == 6
        raise KeyboardInterrupt
    assert loop.pipe.guider is own and guider._source is None
    assert torch.equal(loop(), expected)
    with pytest.raises(TypeError, match="takes a guider of hfnoise or diffusers"), guide(loop.pipe, 3):
        raise AssertionError("it was taken")


# Modules as they are used. ----------------------------------------------------------------------------------------


def offloaded(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.enable_model_cpu_offload(device="cpu")


def offloaded_layers(pipe):
    import accelerate

    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


def offloaded_groups(pipe):
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(pipe.unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def cast_layers(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def adapted(pipe):
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def sliced(pipe):
    pipe.enable_attention_slicing()


def freed(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


@slow
@pytest.mark.parametrize(
    "change", [offloaded, offloaded_layers, offloaded_groups, cast_layers, adapted, sliced, freed]
)
def test_modules_that_were_changed(pipe, change):
    """Twice guided, and stock again: hooks, adapters and attention processors stay where they are."""
    change(pipe)
    expected = run(pipe)
    for _ in range(2):
        assert torch.equal(guided(pipe, never()), expected)
        guider = AdaptiveGuidance(threshold=0.01, min_steps=0.0)
        guided(pipe, guider)
        assert guider.report.rows == (4, 2, 2, 2)
    assert torch.equal(run(pipe), expected) and not is_compiled(pipe.unet)
