"""The presets as what `DiffusionPipeline.from_pretrained(repository, custom_pipeline=folder)` takes.

diffusers wants ONE class there, whose constructor lists the components, whatever model is loaded with it. Ours lists
those of all pipelines, and what is made of them is the guided class of the one that the repository's index names.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from hfnoise.pipelines.adaptive_guidance import AdaptiveGuidancePipeline
from hfnoise.pipelines.auto_guided import AutoGuidedPipeline, stock_class_named
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
    """Becomes the guided class of the model that diffusers loads it for, with the guider of a preset.

    A guider that was saved in the repository is not seen here, since diffusers does not say where it loads from: give
    `guider=` to `from_pretrained`, or load with [`AutoGuidedPipeline`].
    """

    preset: ClassVar[type[AutoGuidedPipeline]]
    # So that diffusers passes None for those that the model has not.
    _optional_components = COMPONENTS

    def __new__(cls, *, index: dict[str, Any] | None = None, guider: Any = None, **components: Any) -> Any:
        if index is None:
            raise TypeError(
                f"{cls.__name__} is for DiffusionPipeline.from_pretrained(repository, custom_pipeline=...); use "
                f"{cls.preset.__name__} by itself."
            )
        stock = _stock_class(index)
        expected = inspect.signature(stock.__init__).parameters
        settings = {name: value for name, value in index.items() if name in expected and not isinstance(value, list)}
        given = {name: value for name, value in components.items() if name in expected}
        return cls.preset.from_pipe(stock(**settings, **given), guider=guider)

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return which components are loaded, and the index to make the pipeline with; called by diffusers."""
        expected = inspect.signature(_stock_class(config_dict).__init__).parameters
        settings = {name: kwargs.pop(name) for name in [*kwargs] if name in expected}
        components = {name: value for name, value in config_dict.items() if isinstance(value, list | tuple)}
        return {**components, "index": {**config_dict, **settings}}, kwargs, {}


def _make_signature(self: Any, *, index: Any = None, guider: Any = None) -> None: ...


_KINDS = inspect.Parameter
_make_signature.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        _KINDS("self", _KINDS.POSITIONAL_OR_KEYWORD),
        *(_KINDS(name, _KINDS.KEYWORD_ONLY) for name in COMPONENTS),
        *(_KINDS(name, _KINDS.KEYWORD_ONLY, default=None) for name in ("index", "guider")),
    ]
)
CustomPipeline.__init__ = _make_signature  # type: ignore[method-assign]


class AdaptiveGuidanceCustomPipeline(CustomPipeline):
    """[`AdaptiveGuidancePipeline`] for `custom_pipeline=`."""

    preset = AdaptiveGuidancePipeline


class ProjectedGuidanceCustomPipeline(CustomPipeline):
    """[`ProjectedGuidancePipeline`] for `custom_pipeline=`."""

    preset = ProjectedGuidancePipeline


def _stock_class(index: dict[str, Any]) -> type[DiffusionPipeline]:
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"the pipeline class of this repository is code of its own, {name}: it is custom already.")
    return stock_class_named(name, "this repository")
