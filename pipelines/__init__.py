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
    "GoldenNoisePipeline": "golden_noise",
    "GuidanceRecorder": "guiders",
    "GuidanceReport": "guidance_report",
    "InitialNoise": "initial_noise",
    "InitialNoiseBlock": "modular_start",
    "InitialNoiseChain": "noise_chain",
    "LatentSpace": "latent_space",
    "LinearGuidance": "guiders",
    "NPNet": "noise_nets",
    "NoiseLevelGuidance": "noise_level",
    "NoiseNet": "noise_nets",
    "NoisePromptNet": "noise_nets",
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
    "StartComparison": "start_comparison",
    "StartContext": "start_context",
    "StartEstimate": "start_estimate",
    "StartGap": "gap",
    "StartReport": "start_report",
    "StartState": "initial_noise",
    "TerminalPrior": "terminal_prior",
    "UpdateGuidance": "guiders",
    "ZeroOrderSearch": "zero_order_search",
    "clip_verifier": "image_text_verifier",
    "collect_noise_pairs": "noise_pairs",
    "compare_starts": "start_comparison",
    "few_step_reward": "few_step_reward",
    "guide": "guided",
    "guided_class": "guided",
    "load_noise_net": "noise_nets",
    "named_verifier": "named_verifiers",
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
