"""The presets as what `DiffusionPipeline.from_pretrained(repository, custom_pipeline=folder)` takes.

diffusers wants ONE class there, whose constructor lists the components, whatever model is loaded with it. Ours lists
those of all pipelines, and what is made of them is the guided class of the one that the repository's index names.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from hfnoise.pipelines.adaptive_guidance import AdaptiveGuidancePipeline
from hfnoise.pipelines.auto_guided import NOISE_AT_HAND, AutoGuidedPipeline, stock_class_named
from hfnoise.pipelines.golden_noise import GoldenNoisePipeline
from hfnoise.pipelines.one_more_step_preset import OneMoreStepPipeline
from hfnoise.pipelines.projected_guidance import ProjectedGuidancePipeline

# Of every pipeline that can be guided; a test compares.
COMPONENTS = """
    adapter bert controlnet decoder depth_estimator duration_embedder feature_extractor image_encoder
    image_feature_extractor image_noising_scheduler image_normalizer image_processor image_unet inverse_scheduler
    language_model low_res_scheduler motion_adapter movq ocr_guider pe pe_tokenizer prior prior_scheduler
    prior_text_encoder prior_tokenizer processor projection_model qformer safety_checker scheduler shap_e_renderer
    text_encoder text_encoder_2 text_encoder_3 text_encoder_4 text_processor text_unet tokenizer tokenizer_2
    tokenizer_3 tokenizer_4 transformer transformer_2 unet vae vision_language_encoder vocoder vqgan vqvae watermarker
""".split()


class CustomPipeline(DiffusionPipeline):
    """Becomes the guided class of the model that diffusers loads it for, with the guider or initial noise of a preset.

    What was saved in the repository is not seen here, since diffusers does not say where it loads from: give `guider=`
    or `initial_noise=` to `from_pretrained`, or load with [`AutoGuidedPipeline`].
    """

    preset: ClassVar[type[AutoGuidedPipeline]]
    # So that diffusers passes None for those that the model has not.
    _optional_components = COMPONENTS

    # Of `from_pipe` of the preset.
    slots: ClassVar[tuple[str, ...]] = ("guider", "initial_noise")

    def __new__(cls, *, index: dict[str, Any] | None = None, **given: Any) -> Any:
        if index is None:
            raise TypeError(
                f"{cls.__name__} is for DiffusionPipeline.from_pretrained(repository, custom_pipeline=...); use "
                f"{cls.preset.__name__} by itself."
            )
        stock = _stock_class(index)
        expected = inspect.signature(stock.__init__).parameters
        settings = {name: value for name, value in index.items() if name in expected and not isinstance(value, list)}
        slots = {name: given.pop(name) for name in cls.slots if given.get(name) is not None}
        if not set(slots) - {"guider"} and NOISE_AT_HAND.get() is not None:
            slots["initial_noise"] = NOISE_AT_HAND.get()
        components = {name: value for name, value in given.items() if name in expected}
        return cls.preset.from_pipe(stock(**settings, **components), **slots)

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return which components are loaded, and the index to make the pipeline with; called by diffusers."""
        expected = inspect.signature(_stock_class(config_dict).__init__).parameters
        settings = {name: kwargs.pop(name) for name in [*kwargs] if name in expected}
        components = {name: value for name, value in config_dict.items() if isinstance(value, list | tuple)}
        return {**components, "index": {**config_dict, **settings}}, kwargs, {}


_KINDS = inspect.Parameter


def _init_of(options: Sequence[str]) -> Any:
    """Return a constructor that takes all components and these, and does nothing: diffusers reads its signature."""

    def __init__(self: Any, **given: Any) -> None: ...

    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            _KINDS("self", _KINDS.POSITIONAL_OR_KEYWORD),
            *(_KINDS(name, _KINDS.KEYWORD_ONLY) for name in COMPONENTS),
            *(_KINDS(name, _KINDS.KEYWORD_ONLY, default=None) for name in ("index", *options)),
        ]
    )
    return __init__


CustomPipeline.__init__ = _init_of(CustomPipeline.slots)  # type: ignore[method-assign]


class AdaptiveGuidanceCustomPipeline(CustomPipeline):
    """[`AdaptiveGuidancePipeline`] for `custom_pipeline=`."""

    preset = AdaptiveGuidancePipeline


class ProjectedGuidanceCustomPipeline(CustomPipeline):
    """[`ProjectedGuidancePipeline`] for `custom_pipeline=`."""

    preset = ProjectedGuidancePipeline


class OneMoreStepCustomPipeline(CustomPipeline):
    """[`OneMoreStepPipeline`] for `custom_pipeline=`, with its `oms_module` too."""

    preset = OneMoreStepPipeline
    slots = (*CustomPipeline.slots, "oms_module")
    __init__ = _init_of(slots)


class GoldenNoiseCustomPipeline(CustomPipeline):
    """[`GoldenNoisePipeline`] for `custom_pipeline=`, with its `npnet` too."""

    preset = GoldenNoisePipeline
    slots = (*CustomPipeline.slots, "npnet")
    __init__ = _init_of(slots)


def _stock_class(index: dict[str, Any]) -> type[DiffusionPipeline]:
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"the pipeline class of this repository is code of its own, {name}: it is custom already.")
    return stock_class_named(name, "this repository")
