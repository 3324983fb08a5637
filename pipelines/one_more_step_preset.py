"""Any pipeline with One More Step in one line."""

from __future__ import annotations

from os import PathLike
from typing import Any

from hfnoise.latents.hf_checkpoints import MODULE_FOLDER
from hfnoise.pipelines.call_options import one_more_steps, take_oms_options, with_oms_options
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
    the pipeline for that call only: `pipe(prompt, oms_prompt="a black cat", oms_guidance_scale=1.5)`;
    `oms_enabled=False` is the stock pipeline to the bit.

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
    def _of_network(cls, network: Any, options: dict[str, Any], changed: dict[str, Any]) -> InitialNoise:
        if isinstance(network, (str, PathLike)):
            return OneMoreStep.from_pretrained(network, **options, **changed)
        if isinstance(network, OneMoreStep):
            return network.with_options(**changed) if changed else network
        return OneMoreStep(network, **changed)

    @classmethod
    def _check_kind(cls, noise: InitialNoise) -> None:
        if not one_more_steps(noise):
            raise TypeError(
                "OneMoreStepPipeline takes a OneMoreStep, alone or in a list with others, got "
                f"{type(noise).__name__}. AutoGuidedPipeline takes any."
            )

    @classmethod
    def _take_options(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if "oms_enabled" in kwargs:
            raise TypeError(
                "oms_enabled is for one call of the pipeline: pipe(prompt, oms_enabled=False). For all calls it is "
                "oms_scale=0."
            )
        return take_oms_options(kwargs)

    @classmethod
    def _with_options(cls, noise: InitialNoise, changed: dict[str, Any]) -> InitialNoise:
        return with_oms_options(noise, changed)
