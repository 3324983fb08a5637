"""What `hfnoise generate` can start from: each member by the option that asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hfnoise.errors import UsageError
from hfnoise.pipelines.brightness_offset import BrightnessOffset
from hfnoise.pipelines.initial_noise import InitialNoise
from hfnoise.pipelines.named_verifiers import named_verifier
from hfnoise.pipelines.noise_level import NoiseLevelGuidance
from hfnoise.pipelines.noise_nets import NoisePromptNet, NPNet, load_noise_net
from hfnoise.pipelines.noise_search import NoiseSearch
from hfnoise.pipelines.one_more_step import OneMoreStep
from hfnoise.pipelines.path_search import PathSearch
from hfnoise.pipelines.pipeline_loading import find_device
from hfnoise.pipelines.random_search import RandomSearch
from hfnoise.pipelines.redenoise import ReDenoise
from hfnoise.pipelines.seed_variation import SeedVariation
from hfnoise.pipelines.zero_order_search import ZeroOrderSearch

if TYPE_CHECKING:
    from hfnoise.pipelines.generate_config import GenerateConfig

_SEARCHES: dict[str, type[NoiseSearch]] = {
    "random": RandomSearch, "zero_order": ZeroOrderSearch, "path": PathSearch
}  # fmt: skip


def _one_more_step(config: GenerateConfig, dtype: torch.dtype) -> OneMoreStep:
    options: dict[str, Any] = {} if config.oms_variant is None else {"variant": config.oms_variant}
    try:
        return OneMoreStep.from_pretrained(
            str(config.oms_module), torch_dtype=dtype, **options, **_one_more_step_options(config)
        )
    except (OSError, ValueError, TypeError) as error:
        hint = "" if options or not isinstance(error, OSError) else " The published modules need --oms_variant fp16."
        raise UsageError(f"--oms_module {config.oms_module}: {_first_line(error)}{hint}") from error


def _one_more_step_options(config: GenerateConfig) -> dict[str, Any]:
    """Return the options of [`OneMoreStep`] that are given."""
    given = {"eta": config.oms_eta, "guidance_scale": config.oms_guidance_scale, "scale": config.oms_scale}
    return {name: value for name, value in given.items() if value is not None}


def _brightness(config: GenerateConfig, dtype: torch.dtype) -> BrightnessOffset:
    assert config.brightness is not None
    return BrightnessOffset(config.brightness)


def _unchanged(config: GenerateConfig) -> dict[str, Any]:
    return {}


def _seed_variation(config: GenerateConfig, dtype: torch.dtype) -> SeedVariation:
    assert config.seed_variation is not None
    return SeedVariation(config.seed_variation, seed=config.variation_seed)


def _variation_options(config: GenerateConfig) -> dict[str, Any]:
    return {} if config.variation_seed is None else {"seed": config.variation_seed}


def _redenoise(config: GenerateConfig, dtype: torch.dtype) -> ReDenoise:
    return ReDenoise(strength=config.redenoise_strength)


def _redenoise_options(config: GenerateConfig) -> dict[str, Any]:
    # One of the two sets the size of the step.
    return {} if config.redenoise_strength is None else {"num_steps": None, "strength": config.redenoise_strength}


def _noise_level_guidance(config: GenerateConfig, dtype: torch.dtype) -> NoiseLevelGuidance:
    assert config.noise_level_guidance is not None
    return NoiseLevelGuidance(config.noise_level_guidance)


def _npnet(config: GenerateConfig, dtype: torch.dtype) -> InitialNoise:
    try:
        return load_noise_net(str(config.npnet), **_npnet_options(config))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--npnet {config.npnet}: {_first_line(error)}") from error


def _npnet_options(config: GenerateConfig) -> dict[str, Any]:
    return {} if config.npnet_scale is None else {"scale": config.npnet_scale}


def _search(config: GenerateConfig, dtype: torch.dtype) -> NoiseSearch:
    assert config.search is not None and config.verifier is not None and config.budget is not None
    try:
        device = find_device(config.device)
        verifiers = {name: named_verifier(name, device=device) for name in config.verifier.split("+")}
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--verifier {config.verifier}: {_first_line(error)}") from error
    return _SEARCHES[config.search](verifiers, config.budget, preview_steps=config.preview_steps)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


# By the option that asks for it: the classes of a member, what makes it, and which options change a saved one.
MEMBERS: dict[
    str, tuple[tuple[type, ...], Callable[[Any, torch.dtype], InitialNoise], Callable[[Any], dict[str, Any]]]
] = {
    "seed_variation": ((SeedVariation,), _seed_variation, _variation_options),
    "redenoise": ((ReDenoise,), _redenoise, _redenoise_options),
    "noise_level_guidance": ((NoiseLevelGuidance,), _noise_level_guidance, _unchanged),
    "npnet": ((NoisePromptNet, NPNet), _npnet, _npnet_options),
    "search": (tuple(_SEARCHES.values()), _search, _unchanged),
    "oms_module": ((OneMoreStep,), _one_more_step, _one_more_step_options),
    "brightness": ((BrightnessOffset,), _brightness, _unchanged),
}
