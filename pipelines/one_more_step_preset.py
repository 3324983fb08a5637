"""Any pipeline with One More Step in one line."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from torch import nn

from hfnoise.latents.hf_checkpoints import MODULE_FOLDER
from hfnoise.pipelines.call_options import take_oms_options, with_oms_options
from hfnoise.pipelines.initial_noise import InitialNoise
from hfnoise.pipelines.noise_preset import InitialNoisePreset
from hfnoise.pipelines.one_more_step import OneMoreStep


class OneMoreStepPipeline(InitialNoisePreset):
    """[`AutoGuidedPipeline`] with [`OneMoreStep`]: images as dark and as bright as the prompt says.

    One More Step (arXiv 2311.15744). The initial noise is the one given, alone or in a list with others, or else the
    saved one. What is returned is the guided class of the model, with a guider if one is given or saved.
    `from_pretrained` and `from_pipe` take `oms_module=`, a module, or its folder or repository, too: it is short for
    `initial_noise=OneMoreStep(module)`.

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

    network = "oms_module"
    folder = MODULE_FOLDER

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
        given = (pretrained_model_name_or_path, guider, initial_noise)
        return _changed(super().from_pretrained(*given, oms_module=oms_module, **kwargs), changed)

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
        made = super().from_pipe(pipeline, initial_noise=initial_noise, oms_module=oms_module, **kwargs)
        return _changed(made, changed)

    @classmethod
    def _of_network(cls, network: Any, options: dict[str, Any]) -> InitialNoise:
        if isinstance(network, (str, PathLike)):
            return OneMoreStep.from_pretrained(network, **options)
        return network if isinstance(network, OneMoreStep) else OneMoreStep(network)

    @classmethod
    def _check_members(cls, members: Sequence[InitialNoise]) -> None:
        if not any(isinstance(member, OneMoreStep) for member in members):
            raise TypeError(
                f"OneMoreStepPipeline takes a OneMoreStep, alone or in a list with others, got "
                f"{' and '.join(type(member).__name__ for member in members)}. AutoGuidedPipeline takes any."
            )


def _changed(pipe: Any, options: dict[str, Any]) -> Any:
    if options:
        pipe.initial_noise = with_oms_options(pipe.initial_noise, options)
    return pipe


def _lasting_options(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    if "oms_enabled" in kwargs:
        raise TypeError(
            "oms_enabled is for one call of the pipeline: pipe(prompt, oms_enabled=False). For all calls it is "
            "oms_scale=0."
        )
    return take_oms_options(kwargs)
