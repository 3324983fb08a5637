"""Any pipeline with One More Step in one line."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

from hfnoise.latents.hf_checkpoints import HUB_OPTIONS, MODULE_FOLDER
from hfnoise.pipelines.auto_guided import AutoGuidedPipeline
from hfnoise.pipelines.call_options import one_more_steps, take_oms_options, with_oms_options
from hfnoise.pipelines.guided import guided_class
from hfnoise.pipelines.initial_noise import InitialNoise, check_initial_noise
from hfnoise.pipelines.one_more_step import OneMoreStep
from hfnoise.pipelines.saved_parts import PipelineRepository, part_dtype

# All but the revision: it is another repository.
_DOWNLOAD_OPTIONS = tuple(name for name in HUB_OPTIONS if name != "revision")


class OneMoreStepPipeline(AutoGuidedPipeline):
    """[`AutoGuidedPipeline`] with [`OneMoreStep`]: images as dark and as bright as the prompt says.

    One More Step (arXiv 2311.15744). The initial noise is the one given, alone or in a list with others, or else the
    saved one. What is returned is the guided class of the model, with a guider if one is given or saved.

    Options of [`OneMoreStep`], with `oms_` before their names, are taken by both class methods, and by the call of
    the pipeline for that call only: `pipe(prompt, oms_prompt="a black cat", oms_guidance_scale=1.5)`. With
    `oms_enabled=False` a call is the stock pipeline's to the bit.

    Example:
        >>> from hfnoise.pipelines import OneMoreStepPipeline
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> module = new_digits_pipeline(width=8, seed=1).unet
        >>> pipe = OneMoreStepPipeline.from_pipe(new_digits_pipeline(width=8), oms_module=module)
        >>> pipe.save_pretrained("digits")
        >>> OneMoreStepPipeline.from_pretrained("digits").initial_noise.eta
        0.0
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        guider: Any = None,
        initial_noise: Any = None,
        oms_module: nn.Module | OneMoreStep | str | PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the guided pipeline of a folder or Hub repository, with One More Step.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): of a stock pipeline too.
            guider (*optional*): as in [`AutoGuidedPipeline.from_pretrained`].
            initial_noise ([`OneMoreStep`] or a list with one, *optional*): instead of the saved one.
            oms_module (*optional*): a module, or its folder or repository, loaded with the `variant` and `dtype`
                of this call, its `token`, `cache_dir` and so on; short for `initial_noise=OneMoreStep(module)`.
            kwargs: as in [`AutoGuidedPipeline.from_pretrained`]; and `oms_...`, options of the [`OneMoreStep`].

        Raises:
            TypeError: if there is no [`OneMoreStep`] in `initial_noise`, or no such option.
            ValueError: if there is none at all, or both `initial_noise` and `oms_module`, or the pipeline cannot take
                it.
        """
        changed, kwargs = _lasting_options(kwargs)
        options = {name: kwargs.get(name) for name in ("variant", "use_safetensors", *_DOWNLOAD_OPTIONS)}
        options["dtype"] = part_dtype(kwargs, MODULE_FOLDER)
        noise = _given(initial_noise, oms_module, options, changed)
        pipe = super().from_pretrained(pretrained_model_name_or_path, guider, noise, **kwargs)
        if changed and oms_module is None:
            pipe.initial_noise = with_oms_options(pipe.initial_noise, changed)
        return pipe

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        *,
        initial_noise: Any = None,
        oms_module: nn.Module | OneMoreStep | str | PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the guided pipeline of the components of another one, with One More Step.

        Args:
            pipeline: of diffusers, guided or not.
            initial_noise ([`OneMoreStep`] or a list with one, *optional*): that of `pipeline` by default.
            oms_module (*optional*): a module, or its folder or repository, instead; loaded in the dtype of the
                pipeline.
            kwargs: as in [`AutoGuidedPipeline.from_pipe`]; and `oms_...`, options of the [`OneMoreStep`].

        Raises:
            TypeError: if there is no [`OneMoreStep`] in `initial_noise`, or no such option.
            ValueError: if there is none at all, or the pipeline cannot take it.
        """
        changed, kwargs = _lasting_options(kwargs)
        given = _given(initial_noise, oms_module, {"dtype": getattr(pipeline, "dtype", None)}, changed)
        noise = getattr(pipeline, "initial_noise", None) if given is None else given
        stock: Any = type(pipeline)
        noise = _checked(guided_class(stock), noise, stock.__name__)
        if changed and oms_module is None:
            noise = with_oms_options(noise, changed)
        return super().from_pipe(pipeline, initial_noise=noise, **kwargs)

    @classmethod
    def _choose(cls, guided: type, repository: PipelineRepository, guider: Any, initial_noise: Any) -> tuple[Any, Any]:
        guider, noise = super()._choose(guided, repository, guider, initial_noise)
        return guider, _checked(guided, noise, repository.path)


def _lasting_options(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    if "oms_enabled" in kwargs:
        raise TypeError(
            "oms_enabled is for one call of the pipeline: pipe(prompt, oms_enabled=False). For all calls it is "
            "oms_scale=0."
        )
    return take_oms_options(kwargs)


def _given(initial_noise: Any, oms_module: Any, options: dict[str, Any], changed: dict[str, Any]) -> Any:
    """Return the initial noise that is given; `changed` are options of the step that `oms_module` is short for."""
    if oms_module is None:
        return initial_noise
    if initial_noise is not None:
        raise ValueError("give initial_noise or oms_module, which is short for initial_noise=OneMoreStep(module).")
    if isinstance(oms_module, (str, PathLike)):
        given = {name: value for name, value in options.items() if value is not None}
        return OneMoreStep.from_pretrained(oms_module, **given, **changed)
    if isinstance(oms_module, OneMoreStep):
        return oms_module.with_options(**changed) if changed else oms_module
    return OneMoreStep(oms_module, **changed)


def _checked(pipeline_class: type, initial_noise: Any, place: str) -> InitialNoise:
    noise = check_initial_noise(pipeline_class, initial_noise)
    if noise is None:
        raise ValueError(
            f"{place} has no oms_module. Give oms_module=, a module or its repository, or initial_noise=."
        )
    if not one_more_steps(noise):
        raise TypeError(
            f"OneMoreStepPipeline takes a OneMoreStep, alone or in a list with others, got {type(noise).__name__}. "
            "AutoGuidedPipeline takes any."
        )
    return noise
