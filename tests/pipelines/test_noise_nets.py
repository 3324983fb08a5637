"""NPNet and NoisePromptNet in real pipelines: what they are given, off is stock, saving, refusals."""

import diffusers
import pytest
import torch
from diffusers import ModelMixin

import hfnoise
from hfnoise.pipelines import BrightnessOffset, InitialNoise, guide
from hfnoise.pipelines.initial_noise import refined_start
from hfnoise.pipelines.start_context import StartContext
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of
from hfnoise.worlds.tiny_pipelines.unets import WIDTH
from tests.latents.npnet_states import TINY, perturbed
from tests.pipelines.modular_sdxl import call, classic_sdxl, modular_sdxl
from tests.pipelines.tiny_starts import run, sd_call

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]

SMALL = {"pooled_dim": 8, "map_size": 4, "hidden_channels": 8, "norm_num_groups": 2}


def new_npnet(**options):
    torch.manual_seed(0)
    return perturbed(hfnoise.NPNet(**{**TINY, "encoder_hid_dim": WIDTH, **options}))


def new_prompt_net(**options):
    torch.manual_seed(0)
    return perturbed(hfnoise.NoisePromptNet(**{**SMALL, "encoder_hid_dim": WIDTH, **options}), size=0.2)


NETS = [new_npnet, new_prompt_net]


class Watched(hfnoise.NoisePromptNet):
    """Keeps what it is given."""

    def forward(self, noise, prompt_embeds, attention_mask=None):
        self.given = (noise, prompt_embeds, attention_mask)
        return super().forward(noise, prompt_embeds, attention_mask)


SLOW = ("sd-inpaint-9", "sd-controlnet", "lcm", "sd3", "pixart-sigma", "sana", "flux", "qwen-image")


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("sdxl", new_npnet),
        pytest.param("sdxl", new_prompt_net, marks=pytest.mark.slow),
        *(pytest.param(name, new, marks=pytest.mark.slow) for name in SLOW for new in NETS),
    ],
)
def test_pipelines(name, new):
    """Off is stock to the bit, on is not, and a sample is the same alone."""
    family = FAMILIES[name]
    pipe, net = family.build(), new(**({"num_tokens": 6} if new is new_npnet else {}))
    stock = images_of(pipe(**family.call(2)))
    net.scale = 0.0
    assert torch.equal(run(pipe, family.call(2), net), stock)
    net.scale = 1.0
    together = run(pipe, family.call(2), net)
    assert not torch.allclose(together, stock) and torch.equal(run(pipe, family.call(2), net), together)
    alone = torch.cat([run(pipe, family.call(1, number), net) for number in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def context_of(pipe, call):
    """Return what an initial noise knows of a call, and the noise."""
    seen = []

    class Seen(InitialNoise):
        def refine(self, unit_noise, context):
            seen.append((unit_noise, context))
            return hfnoise.pipelines.StartState(unit_noise)

    with refined_start(pipe, Seen(), (), call):
        pipe(**call)
    return seen[0]


@pytest.mark.parametrize("new", NETS)
def test_what_it_makes(sd, new):
    net, (noise, context) = new(), context_of(sd, sd_call(2))
    state = net.refine(noise, context)
    assert (state.space, state.evaluations) == ("unit", 1) and not state.latents.requires_grad
    with torch.no_grad():
        assert torch.equal(state.latents, net(noise, context.prompt_embeds).noise)
    assert net.report.evaluations == 1 and 0.0 < net.report.similarity[0] < 1.0
    net.train()
    assert torch.equal(net.refine(noise, context).latents, state.latents)
    assert isinstance(net, ModelMixin) and isinstance(net, InitialNoise)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_latents_for_any_call(name):
    """`latents=` of a stock call, packed where the pipeline packs; the net sees images of latents."""
    family = FAMILIES[name]
    pipe, net = family.build(), Watched(encoder_hid_dim=WIDTH, **SMALL).eval()
    perturbed(net, 0.2)
    latents = net.latents(pipe, **family.call(2))
    assert net.given[0].dim() == 4 and net.given[0].shape[1] == 4
    expected = run(pipe, family.call(2), net)
    torch.testing.assert_close(images_of(pipe(**{**family.call(2), "latents": latents})), expected)


def test_images_of_a_prompt_and_masks():
    """The states are repeated for each image of a prompt, and a mask of the pipeline's with them."""
    net = Watched(encoder_hid_dim=WIDTH, **SMALL).eval()
    for name, mask in (("sd-ddim", None), ("pixart-sigma", torch.tensor([[1] * 4 + [0] * 2] * 2))):
        pipe, call = FAMILIES[name].build(), {**FAMILIES[name].call(1), "num_images_per_prompt": 2}
        if mask is not None:
            call["prompt_attention_mask"] = mask[:1]
        run(pipe, {key: value for key, value in call.items() if key not in ("generator", "latents")}, net)
        noise, states, given = net.given
        assert len(noise) == len(states) == 2 and torch.equal(*states.chunk(2)) and noise.std() < 1.5
        assert given is None if mask is None else torch.equal(given, mask)


def test_pooled_states_are_no_mask():
    states, pooled = torch.zeros(2, 4, 3), torch.tensor([[0.5, 1.0, 0.0, 0.0]] * 2)
    cpu = torch.device("cpu")
    context = StartContext(None, {}, 2, cpu, encoded=(states, pooled, pooled.bool()))
    assert context.prompt_mask.dtype == torch.bool
    assert StartContext(None, {}, 2, cpu, encoded=(states, 0 * pooled)).prompt_mask is None
    assert StartContext(None, {}, 2, cpu).prompt_mask is None


def test_chain(sd):
    """Nets first, states of the scheduler last; nets may follow each other."""
    first, second = new_npnet(), new_prompt_net()
    chained = run(sd, sd_call(), [first, second, BrightnessOffset(0.5)])
    assert not torch.allclose(chained, run(sd, sd_call(), [second, BrightnessOffset(0.5)]))
    noise, context = context_of(sd, sd_call())
    state = hfnoise.InitialNoiseChain([first, second]).refine(noise, context)
    assert state.evaluations == 2
    assert torch.equal(state.latents, second.refine(first.refine(noise, context).latents, context).latents)
    with guide(sd, hfnoise.AdaptiveGuidance(threshold=1.0), initial_noise=first):
        guided = images_of(sd(**sd_call()))
    assert torch.equal(guided, run(sd, sd_call(), first))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipeline(dtype):
    """A seed has the noise of its dtype, and the refined noise is that of float32, rounded once."""
    pipe, net = FAMILIES["sd-ddim"].build().to(dtype), new_prompt_net()
    call = {**sd_call(), "output_type": "latent"}
    noise, context = context_of(pipe, call)
    assert noise.dtype == torch.float32 and context.dtype == dtype
    whole = net.refine(noise, context).latents
    assert whole.dtype == torch.float32 and bool(torch.isfinite(run(pipe, call, net)).all())
    assert torch.allclose(net.to(dtype).refine(noise, context).latents, whole, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("new", NETS)
def test_a_pipeline_is_saved_with_it(tmp_path, new):
    base = FAMILIES["sd-ddim"].build()
    pipe = hfnoise.GuidedStableDiffusionPipeline.from_pipe(base, initial_noise=new(scale=0.5))
    pipe.save_pretrained(tmp_path)
    again = hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path)
    assert type(again.initial_noise) is type(pipe.initial_noise) and again.initial_noise.scale == 0.5
    assert torch.equal(images_of(again(**sd_call())), images_of(pipe(**sd_call())))
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(images_of(stock(**sd_call())), images_of(base(**sd_call())))
    assert torch.equal(run(stock, sd_call(), new(scale=0.5)), images_of(pipe(**sd_call())))


@pytest.mark.slow
@pytest.mark.parametrize("new", NETS)
def test_part_of_a_pipeline_of_somebody_else(tmp_path, new):
    """A class with a slot of its own names it in model_index.json as hfnoise and its class."""

    class WithNet(diffusers.DDPMPipeline):
        def __init__(self, unet, scheduler, net):
            super().__init__(unet, scheduler)
            self.register_modules(net=net)

    net = new()
    WithNet(FAMILIES["sd-ddim"].build().unet, diffusers.DDPMScheduler(), net).save_pretrained(tmp_path)
    again = WithNet.from_pretrained(tmp_path)
    assert again.config["net"] == ("hfnoise", type(net).__name__) and type(again.net) is type(net)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in again.net.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("new", NETS)
def test_modular_pipelines(tmp_path, new):
    """The classic start, and a component that is saved by the name of its class."""
    blocks = diffusers.StableDiffusionXLAutoBlocks()
    classic, net = classic_sdxl(), new()
    pipe = modular_sdxl(classic, hfnoise.with_initial_noise(blocks))
    starts = []
    for one in (classic, pipe):
        hook = one.unet.register_forward_pre_hook(lambda module, args: starts.append(args[0][:2]))
        with guide(one, initial_noise=net):
            one(**call(["the digit one", "the digit two"], steps=1, generator=torch.Generator().manual_seed(0)))
        hook.remove()
    assert torch.equal(starts[0], starts[1])
    pipe.update_components(initial_noise=net)
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    again = hfnoise.with_initial_noise(blocks).init_pipeline(str(tmp_path))
    again.load_components()
    assert type(again.initial_noise) is type(net)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in again.initial_noise.state_dict().items())


def test_refused(sd):
    noise, context = context_of(sd, sd_call())
    for new, name in zip(NETS, ("NPNet", "NoisePromptNet"), strict=True):
        with pytest.raises(
            ValueError,
            match=rf"{name} takes text states 12 wide \(encoder_hid_dim\), and the text states of "
            "StableDiffusionPipeline are 16 wide. Load one",
        ):
            new(encoder_hid_dim=12).refine(noise, context)
        with pytest.raises(
            ValueError, match=rf"{name} refines images of latents of 16 channels.* has latents of shape \(1, 4, 8, 8\)"
        ):
            new(in_channels=16).refine(noise, context)
        with pytest.raises(ValueError, match="the latents given to StableDiffusionPipeline hold NaN"):
            run(sd, {**sd_call(), "latents": torch.full((1, 4, 8, 8), torch.nan)}, new())
        broken = new()
        with torch.no_grad():
            for parameter in broken.parameters():
                parameter.fill_(torch.inf)
        with pytest.raises(ValueError, match=f"{name} put out NaN or infinity; its weights are torch.float32"):
            broken.refine(noise, context)
        with pytest.raises(ValueError, match="StableDiffusionPipeline encoded no prompt before.* needs text states"):
            new().refine(noise, StartContext(sd, {}, 1, torch.device("cpu")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sd-instruct-pix2pix", "InstructPix2PixPipeline has no encode_prompt, and NoisePromptNet refines noise for"),
        ("wan-2.1", r"images of latents of 4 channels.* WanPipeline has latents of shape \(1, 4, 2, 4, 4\)"),
    ],
)
def test_refused_pipelines(name, message):
    family = FAMILIES[name]
    with pytest.raises(ValueError, match=message):
        run(family.build(), family.call(1), new_prompt_net())
