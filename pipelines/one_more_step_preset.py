"""Any pipeline with One More Step in one line."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from hfnoise.latents.hf_checkpoints import MODULE_FOLDER
from hfnoise.pipelines.initial_noise import InitialNoise
from hfnoise.pipelines.noise_preset import InitialNoisePreset
from hfnoise.pipelines.one_more_step import OneMoreStep


class OneMoreStepPipeline(InitialNoisePreset):
    """[`AutoGuidedPipeline`] with [`OneMoreStep`]: images as dark and as bright as the prompt says.

    One More Step (arXiv 2311.15744). The initial noise is the one given, alone or in a list with others, or else the
    saved one. What is returned is the guided class of the model, with a guider if one is given or saved.
    `from_pretrained` and `from_pipe` take `oms_module=`, a module, or its folder or repository, too: it is short for
    `initial_noise=OneMoreStep(module)`.

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
