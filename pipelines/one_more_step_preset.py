"""Any pipeline with One More Step in one line."""

from __future__ import annotations

from typing import Any

from hfnoise.pipelines.auto_guided import AutoGuidedPipeline
from hfnoise.pipelines.guided import guided_class
from hfnoise.pipelines.initial_noise import InitialNoise, check_initial_noise
from hfnoise.pipelines.noise_chain import InitialNoiseChain
from hfnoise.pipelines.one_more_step import OneMoreStep
from hfnoise.pipelines.saved_parts import PipelineRepository


class OneMoreStepPipeline(AutoGuidedPipeline):
    """[`AutoGuidedPipeline`] with [`OneMoreStep`]: images as dark and as bright as the prompt says.

    One More Step (arXiv 2311.15744). The initial noise is the one given, alone or in a list with others, or else the
    saved one. What is returned is the guided class of the model, with a guider if one is given or saved.

    Example:
        >>> from hfnoise.pipelines import OneMoreStep, OneMoreStepPipeline
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> module = new_digits_pipeline(width=8, seed=1).unet
        >>> pipe = OneMoreStepPipeline.from_pipe(new_digits_pipeline(width=8), initial_noise=OneMoreStep(module))
        >>> pipe.save_pretrained("digits")
        >>> OneMoreStepPipeline.from_pretrained("digits").initial_noise.eta
        0.0
    """

    @classmethod
    def from_pipe(cls, pipeline: Any, *, initial_noise: Any = None, **kwargs: Any) -> Any:
        """Return the guided pipeline of the components of another one, with One More Step.

        Args:
            pipeline: of diffusers, guided or not.
            initial_noise ([`OneMoreStep`] or a list with one): that of `pipeline` by default.
            kwargs: as in [`AutoGuidedPipeline.from_pipe`].

        Raises:
            TypeError: if there is no [`OneMoreStep`] in `initial_noise`.
            ValueError: if there is none at all, or the pipeline cannot take it.
        """
        noise = getattr(pipeline, "initial_noise", None) if initial_noise is None else initial_noise
        stock: Any = type(pipeline)
        noise = _checked(guided_class(stock), noise, stock.__name__)
        return super().from_pipe(pipeline, initial_noise=noise, **kwargs)

    @classmethod
    def _choose(cls, guided: type, repository: PipelineRepository, guider: Any, initial_noise: Any) -> tuple[Any, Any]:
        guider, noise = super()._choose(guided, repository, guider, initial_noise)
        return guider, _checked(guided, noise, repository.path)


def _checked(pipeline_class: type, initial_noise: Any, place: str) -> InitialNoise:
    noise = check_initial_noise(pipeline_class, initial_noise)
    if noise is None:
        raise ValueError(
            f"{place} has no oms_module. Give initial_noise=OneMoreStep.from_pretrained(repository of the module)."
        )
    members = noise.members if isinstance(noise, InitialNoiseChain) else (noise,)
    if not any(isinstance(member, OneMoreStep) for member in members):
        raise TypeError(
            f"OneMoreStepPipeline takes a OneMoreStep, alone or in a list with others, got {type(noise).__name__}. "
            "AutoGuidedPipeline takes any."
        )
    return noise
