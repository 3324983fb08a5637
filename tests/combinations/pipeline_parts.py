"""What the entries of the matrix of pipelines are: denoisers, adapters, guiders, initial noises, hosts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hfnoise import QuestConfig, export_packed, prepare_qat
from hfnoise.latents import ResidualStatistics
from hfnoise.pipelines import (
    AdaptiveGuidance,
    AdaptiveGuidancePipeline,
    AutoGuidedPipeline,
    BrightnessOffset,
    ConditioningNoise,
    GoldenNoisePipeline,
    InitialNoise,
    LinearGuidance,
    NoiseLevelGuidance,
    NoisePromptNet,
    NPNet,
    OneMoreStep,
    OneMoreStepPipeline,
    PathSearch,
    ProjectedGuidance,
    ProjectedGuidancePipeline,
    RandomSearch,
    ReDenoise,
    SeedVariation,
    StartState,
    TerminalPrior,
    ZeroOrderSearch,
    guide,
)
from hfnoise.pipelines.initial_noise import as_initial_noise
from hfnoise.pipelines.noise_chain import members_of
from hfnoise.pipelines.start_context import copied_generators
from hfnoise.worlds.tiny_pipelines import FAMILIES, images_of, transformers
from tests.latents.npnet_states import TINY, perturbed
from tests.pipelines.tiny_starts import new_module

STEPS = 4
WIDTH = 16
CHANNELS = 4
# Evaluations a sample of two images with guidance.
BUDGET = 4 * STEPS
_SMALL = {"encoder_hid_dim": WIDTH, "pooled_dim": 8, "map_size": 4, "hidden_channels": 8, "norm_num_groups": 2}
_DIRECTION = (0.5, -1.0, 2.0, 0.25)
_STATISTICS = ResidualStatistics([0.1, 0.0, 0.0, 0.2], (0.04 * torch.eye(CHANNELS)).tolist())
_VAES = {"sd3": transformers.new_flux_vae, "pixart-alpha": transformers.new_vae, "flux": transformers.new_flux_vae}
SEEDS = (100, 101)


def denoiser_name(pipe: Any) -> str:
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


# Pipelines. ---------------------------------------------------------------------------------------------------------


def build(family: str, denoiser: str = "float", adapter: str = "none") -> Any:
    """Return the pipeline of a family, with another denoiser, and a LoRA on it."""
    pipe = FAMILIES[family].build()
    if family in _VAES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # Made anew: the factor of the VAE is read in the constructor.
            pipe = type(pipe)(**{**pipe.components, "vae": _VAES[family]().eval().requires_grad_(False)})
        pipe.set_progress_bar_config(disable=True)
    name = denoiser_name(pipe)
    model = _DENOISERS[denoiser](getattr(pipe, name))
    if adapter == "LoRA":
        from peft import LoraConfig

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    if denoiser == "compiled":
        # Inductor takes half a minute for a graph; dynamo is what sees the calls.
        model.compile(backend="eager", dynamic=False)
    setattr(pipe, name, model)
    return pipe


def _nf4(model: Any) -> Any:
    import bitsandbytes
    from torch import nn

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and name.startswith("to_"):
                sizes = layer.in_features, layer.out_features, layer.bias is not None
                made = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                made.load_state_dict(layer.state_dict())
                setattr(parent, name, made.to("cpu"))
    return model


_DENOISERS = {
    "float": lambda model: model,
    "W4A4": lambda model: prepare_qat(model, QuestConfig(bits=4)),
    "W1 packed": lambda model: export_packed(prepare_qat(model, QuestConfig(weight_bits=1, activation_bits=None))),
    "NF4": _nf4,
    "compiled": lambda model: model,
}


def bitsandbytes_on_load(model: Any) -> Any:
    """Load it again by the configuration of diffusers."""
    from diffusers import BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return type(model).from_pretrained(folder, quantization_config=config)


# Guiders. -----------------------------------------------------------------------------------------------------------


def new_guider(kind: str) -> Any:
    # Half of the run at least is guided; then a sample stops as soon as its predictions are not opposed.
    stopping = {"threshold": 1e-6, "min_steps": 0.5}
    projection = {"eta": 0.0, "norm_threshold": 1.0, "momentum": -0.5}
    if kind == "none":
        return None
    if kind.startswith("diffusers "):
        import diffusers

        return getattr(diffusers, kind.removeprefix("diffusers "))()
    return {
        "AdaptiveGuidance": lambda: AdaptiveGuidance(**stopping),
        "ProjectedGuidance": lambda: ProjectedGuidance(**projection),
        "LinearGuidance": lambda: LinearGuidance(),
        "Adaptive + Projected": lambda: AdaptiveGuidance(**stopping, inner=ProjectedGuidance(**projection)),
    }[kind]()


def neutral_guider() -> Any:
    return AdaptiveGuidance(threshold=1.0, inner=ProjectedGuidance(eta=1.0))


# Initial noises. ----------------------------------------------------------------------------------------------------


def mean_brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


def _net(net_class: Any, size: float, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return perturbed(net_class(**options), size)


def _npnet(family: str, scale: float = 1.0) -> Any:
    tokens = 6 if family in _VAES or family.startswith("wan") else 8
    options = {**TINY, "encoder_hid_dim": WIDTH, "num_tokens": tokens, "scale": scale}
    return _net(NPNet, 0.2, **options)


def _search(search_class: Any, budget: int, family: str, **options: Any) -> Any:
    return search_class(mean_brightness, budget, prompts="" if has_embeddings(family) else None, **options)


def new_noise(kind: str, family: str) -> InitialNoise | list[InitialNoise] | None:
    if kind == "none":
        return None
    return {
        "ReDenoise": lambda: ReDenoise(),
        "NoiseLevelGuidance": lambda: NoiseLevelGuidance(2, max_relative_step=0.2),
        "NPNet": lambda: _npnet(family),
        "NoisePromptNet": lambda: _net(NoisePromptNet, 0.2, **_SMALL),
        "ConditioningNoise": lambda: ConditioningNoise(0.3),
        "RandomSearch": lambda: _search(RandomSearch, BUDGET, family),
        "ZeroOrderSearch": lambda: _search(ZeroOrderSearch, BUDGET, family),
        "PathSearch": lambda: _search(PathSearch, BUDGET, family),
        "OneMoreStep": lambda: OneMoreStep(new_module(WIDTH)),
        "TerminalPrior": lambda: TerminalPrior(_STATISTICS, scale=2.0),
        "BrightnessOffset": lambda: BrightnessOffset(0.5, _DIRECTION),
        "chain": lambda: [SeedVariation(0.5, seed=3), ReDenoise(), BrightnessOffset(0.5, _DIRECTION)],
        "chain of nets": lambda: [_net(NoisePromptNet, 0.2, **_SMALL), OneMoreStep(new_module(WIDTH))],
    }[kind]()


def noise_that_is_off(kind: str, family: str) -> InitialNoise | list[InitialNoise] | None:
    """Return the same at the setting at which it changes nothing."""
    if kind in ("none", "RandomSearch", "ZeroOrderSearch", "PathSearch"):
        return None  # a search is never off
    off = {
        "ReDenoise": lambda: ReDenoise(strength=0.0),
        "NoiseLevelGuidance": lambda: NoiseLevelGuidance(0),
        "NPNet": lambda: _npnet(family, scale=0.0),
        "NoisePromptNet": lambda: _net(NoisePromptNet, 0.2, **_SMALL, scale=0.0),
        "ConditioningNoise": lambda: ConditioningNoise(0.0),
        "OneMoreStep": lambda: OneMoreStep(new_module(WIDTH), scale=0.0),
        "TerminalPrior": lambda: TerminalPrior(_STATISTICS, scale=0.0),
        "BrightnessOffset": lambda: BrightnessOffset(0.0),
    }
    off["chain"] = lambda: [SeedVariation(0.0), off["ReDenoise"](), off["BrightnessOffset"]()]
    off["chain of nets"] = lambda: [off["NoisePromptNet"](), off["OneMoreStep"]()]
    return off[kind]()


@dataclass
class Kept(InitialNoise):
    """Does what another one does, and keeps what came of it."""

    inner: InitialNoise
    state: StartState | None = None
    encoded: Any = None
    generators: Any = None
    space: str = field(init=False)

    def __post_init__(self) -> None:
        self.space = self.inner.space

    def check_pipeline(self, pipeline_class: type) -> None:
        self.inner.check_pipeline(pipeline_class)

    def condition(self, context: Any) -> Any:
        self.encoded = self.inner.condition(context)
        return self.encoded

    def refine(self, unit_noise: torch.Tensor, context: Any) -> StartState:
        self.state = self.inner.refine(unit_noise, context)
        # A prior draws from them, and a stochastic sampler goes on with what is left.
        self.generators = copied_generators(context.generator)
        self.random_state = torch.get_rng_state()
        return self.state


class Given(InitialNoise):
    """Starts from what another run started from."""

    def __init__(self, kept: Kept) -> None:
        self.kept, self.space = kept, kept.space

    def condition(self, context: Any) -> Any:
        return self.kept.encoded

    def refine(self, unit_noise: torch.Tensor, context: Any) -> StartState:
        for one, other in zip(context.generator or [], self.kept.generators or [], strict=True):
            one.set_state(other.get_state())
        torch.set_rng_state(self.kept.random_state)
        return StartState(self.kept.state.latents.clone(), self.kept.state.space)


# Calls. -------------------------------------------------------------------------------------------------------------


def arguments(family: str, count: int, first: int = 0) -> dict[str, Any]:
    """Return the call of a family; with a VAE that keeps the size, of smaller images."""
    call = FAMILIES[family].call(count, first)
    return {**call, "height": 8, "width": 8} if family in _VAES else call


def has_embeddings(family: str) -> bool:
    return "prompt" not in FAMILIES[family].call(1)


def has_callback(pipe: Any) -> str:
    import inspect

    known = inspect.signature(type(pipe).__call__).parameters
    return "callback_on_step_end" if "callback_on_step_end" in known else "callback"


@contextmanager
def counted_rows(pipe: Any) -> Iterator[list[int]]:
    """Yield the rows of every evaluation of the denoiser."""
    rows: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))))

    hook = getattr(pipe, denoiser_name(pipe)).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


def expected_rows(guided: bool, batch: int, guider: Any, noise: Any) -> int:
    """Return how many rows the reports of a run say that its denoiser evaluated."""
    total = guider.report.evaluations if guider is not None else (2 if guided else 1) * batch * STEPS
    for member in members_of(noise):
        if isinstance(member, (ReDenoise, NoiseLevelGuidance, RandomSearch, ZeroOrderSearch, PathSearch)):
            total += member.report.evaluations * batch
    return total


def preset_of(guider: Any, noise: Any) -> Any:
    """Return the class that is named for what a cell has."""
    if isinstance(guider, AdaptiveGuidance):
        return AdaptiveGuidancePipeline
    if isinstance(guider, ProjectedGuidance):
        return ProjectedGuidancePipeline
    if any(isinstance(member, OneMoreStep) for member in members_of(noise)):
        return OneMoreStepPipeline
    if any(member.space == "unit" for member in members_of(noise)):
        return GoldenNoisePipeline
    return AutoGuidedPipeline


@contextmanager
def hosted(host: str, pipe: Any, guider: Any, noise: Any) -> Iterator[Any]:
    """Yield a pipeline with a guider and an initial noise in one of the ways that users have."""
    if host == "guide":
        with guide(pipe, guider, initial_noise=noise):
            yield pipe
        return
    slots = {"guider": guider, "initial_noise": noise}
    if host == "preset":
        yield preset_of(guider, as_initial_noise(noise)).from_pipe(pipe, **slots)
        return
    guided = AutoGuidedPipeline.from_pipe(pipe, **slots)
    if host == "from_pipe":
        yield guided
        return
    with tempfile.TemporaryDirectory() as folder:
        guided.save_pretrained(folder)
        absent = {name: None for name, part in guided.components.items() if part is None}
        loaded = AutoGuidedPipeline.from_pretrained(folder, **absent)
        loaded.set_progress_bar_config(disable=True)
        yield loaded


def run(pipe: Any, call: dict[str, Any], seed: int = 7) -> torch.Tensor:
    """Return what a call returns; the numbers of the program are always the same for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return images_of(pipe(**call))
