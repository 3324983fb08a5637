"""Diffusers side of hfnoise; import it as `hfnoise.pipelines`. Names are imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

if __name__ != "hfnoise.pipelines":
    # A second copy of every class under another name would break isinstance and pickle without a word.
    raise ImportError("import hfnoise.pipelines instead of the bare folder 'pipelines'")

_MODULES = {
    "AdaptiveGuidance": "guiders",
    "AdaptiveGuidancePipeline": "adaptive_guidance",
    "AutoGuidedPipeline": "auto_guided",
    "AutoGuider": "guiders",
    "BrightnessOffset": "brightness_offset",
    "ConditioningNoise": "conditioning_noise",
    "GuidanceRecorder": "guiders",
    "GuidanceReport": "guidance_report",
    "InitialNoise": "initial_noise",
    "InitialNoiseBlock": "modular_start",
    "InitialNoiseChain": "noise_chain",
    "LatentSpace": "latent_space",
    "LinearGuidance": "guiders",
    "NPNet": "noise_nets",
    "NoiseNet": "noise_nets",
    "NoisePromptNet": "noise_nets",
    "NoiseLevelGuidance": "noise_level",
    "OneMoreStep": "one_more_step",
    "OneMoreStepPipeline": "one_more_step_preset",
    "PathSearch": "path_search",
    "ProjectedGuidance": "guiders",
    "ProjectedGuidancePipeline": "projected_guidance",
    "RandomSearch": "random_search",
    "ReDenoise": "redenoise",
    "SearchTrace": "search_trace",
    "SeedVariation": "seed_variation",
    "StartBranches": "start_branches",
    "StartContext": "start_context",
    "StartGap": "gap",
    "StartEstimate": "start_estimate",
    "StartReport": "start_report",
    "StartState": "initial_noise",
    "TerminalPrior": "terminal_prior",
    "UpdateGuidance": "guiders",
    "ZeroOrderSearch": "zero_order_search",
    "clip_verifier": "image_text_verifier",
    "guide": "guided",
    "guided_class": "guided",
    "start_gap": "gap",
    "with_initial_noise": "modular_start",
}


def __getattr__(name: str) -> Any:
    if name.startswith("Guided") and name not in _MODULES:
        return getattr(import_module("hfnoise.pipelines.guided"), name)
    if name not in _MODULES:
        raise AttributeError(f"module 'hfnoise.pipelines' has no attribute {name!r}; it has {', '.join(_MODULES)}")
    value = getattr(import_module(f"hfnoise.pipelines.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
