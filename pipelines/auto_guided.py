"""The guided pipeline of whatever a repository holds: by the class in its index."""

from __future__ import annotations

from contextvars import ContextVar
from os import PathLike
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.guiders import BaseGuidance

from hfnoise.pipelines.guided import GuidedPipeline, guided_class
from hfnoise.pipelines.guided_saving import read_parts, stock_class
from hfnoise.pipelines.guider_checks import check_guider
from hfnoise.pipelines.guider_options import described
from hfnoise.pipelines.initial_noise import InitialNoise
from hfnoise.pipelines.saved_parts import PipelineRepository

# For a custom pipeline of ours, while diffusers makes it: it is not told from where.
NOISE_AT_HAND: ContextVar[InitialNoise | None] = ContextVar("NOISE_AT_HAND", default=None)


class AutoGuidedPipeline:
    """Loads any pipeline of diffusers as its guided class, with the guider and initial noise that were saved with it.

    It is not made itself: what `from_pretrained` and `from_pipe` return is a `GuidedStableDiffusionPipeline` or the
    like, by the class that `model_index.json` names. For another task with the same components use the class of that
    task: `GuidedStableDiffusionImg2ImgPipeline.from_pipe(pipe)`. The `AutoPipelineFor...` of diffusers refuse guided
    pipelines; registered there, they would make new ones without a guider.
    """

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} is not made; call {name}.from_pretrained(repository) or {name}.from_pipe(pipe).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        guider: BaseGuidance | None = None,
        initial_noise: InitialNoise | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the guided pipeline of a folder or Hub repository.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): of a stock pipeline too.
            guider ([`AdaptiveGuidance`], [`ProjectedGuidance`] or [`LinearGuidance`], *optional*): instead of the
                saved one, which is then not read. To do without: `pipe.guider = None` afterwards.
            initial_noise ([`InitialNoise`] or a list of such, *optional*): instead of the saved one, which is then
                not read; `[]` to do without.
            kwargs: as in `DiffusionPipeline.from_pretrained`, `custom_pipeline` too; `revision`, `token`, `cache_dir`
                and so on hold for the guider and the initial noise as well. Everything is of one commit. Weights of
                the initial noise are loaded in `dtype`, of which a dictionary names them by sub-folder
                (`{"oms_module": torch.float32, "default": torch.float16}`), and of the `variant` where they have it.

        Raises:
            ValueError: if diffusers has no such class; if the saved guider or initial noise cannot be used.
            TypeError: if the guider is none for this pipeline, or none for this preset.

        Example:
            >>> from hfnoise.pipelines import AdaptiveGuidance, AutoGuidedPipeline, guided_class
            >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
            >>> pipe = AutoGuidedPipeline.from_pipe(new_digits_pipeline(width=8), guider=AdaptiveGuidance())
            >>> pipe.save_pretrained("digits")
            >>> type(AutoGuidedPipeline.from_pretrained("digits").guider).__name__
            'AdaptiveGuidance'
        """
        repository, kwargs = PipelineRepository.open(pretrained_model_name_or_path, kwargs)
        if guider is not None:
            cls._check_class(guider)
        name = repository.index.get("_class_name")
        parts = None
        if kwargs.get("custom_pipeline") is None and isinstance(name, str):
            # Before gigabytes are loaded; a class whose code is in a repository is known only then.
            guided: Any = guided_class(stock_class_named(name, repository.path))
            parts = cls._choose(guided, repository, guider, initial_noise)
        elif initial_noise is None:
            initial_noise = repository.initial_noise()
        at_hand = NOISE_AT_HAND.set(None if parts else initial_noise)
        try:
            pipe = DiffusionPipeline.from_pretrained(repository.path, **kwargs)
        finally:
            NOISE_AT_HAND.reset(at_hand)
        loaded: Any = type(pipe)
        made: Any = guided_class(loaded)
        if parts is None:
            own = getattr(pipe, "initial_noise", None)  # of what was given to the custom pipeline
            parts = cls._choose(made, repository, guider, initial_noise if own is None else own)
        return made.from_pipe(pipe, guider=parts[0], initial_noise=parts[1])

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        *,
        guider: BaseGuidance | None = None,
        initial_noise: InitialNoise | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the guided pipeline of the components of another one, without a copy of them.

        Args:
            pipeline: of diffusers, guided or not.
            guider, initial_noise: the slots; those of `pipeline` by default. `initial_noise=[]` is none.
            kwargs: components to replace, and `dtype`, as in `DiffusionPipeline.from_pipe`.

        Raises:
            TypeError: if it is no classic pipeline; if the guider is none for this pipeline, or for this preset.
        """
        if not isinstance(pipeline, DiffusionPipeline | ModularPipeline):
            raise TypeError(
                f"from_pipe takes a pipeline of diffusers, got {described(pipeline)}. For a folder or a name on the "
                f"Hub: {cls.__name__}.from_pretrained."
            )
        source: Any = type(pipeline)
        guided: Any = guided_class(source)
        if guider is not None:
            cls._check_class(guider)
        else:
            guider = cls._preset_guider(getattr(pipeline, "guider", None), type(pipeline).__name__)
        check_guider(guided, guider)
        return guided.from_pipe(pipeline, guider=guider, initial_noise=initial_noise, **kwargs)

    @classmethod
    def _choose(cls, guided: type, repository: PipelineRepository, guider: Any, initial_noise: Any) -> tuple[Any, Any]:
        guider, initial_noise = read_parts(guided, repository, guider, initial_noise)
        guider = cls._preset_guider(guider, repository.path)
        check_guider(guided, guider)
        return guider, initial_noise

    @classmethod
    def _check_class(cls, guider: BaseGuidance) -> None:
        """Refuse what the preset is not named for."""

    @classmethod
    def _preset_guider(cls, found: Any, place: str) -> Any:
        """Return the guider that is there; a preset puts its own in the place of another."""
        return found


def stock_class_named(name: str, path: str) -> Any:
    """Return the pipeline class of diffusers of that name, of which a guided one is asked.

    Args:
        name (`str`): as in an index, with `Guided` or without.
        path (`str`): of the repository, for the error.

    Raises:
        ValueError: if there is none.

    Example:
        >>> from hfnoise.pipelines.auto_guided import stock_class_named
        >>> stock_class_named("GuidedStableDiffusionPipeline", "").__name__
        'StableDiffusionPipeline'
    """
    found: Any = getattr(diffusers, name, None)
    known = isinstance(found, type) and issubclass(found, DiffusionPipeline)
    if not known or issubclass(found, ModularPipeline):
        raise ValueError(
            f"{path} is a {name}, and diffusers {diffusers.__version__} has no such pipeline. If it is newer: "
            "pip install -U diffusers. If it is your own class: guided_class(YourPipeline).from_pretrained(...)."
        )
    return stock_class(found) if issubclass(found, GuidedPipeline) else found
