"""What presets with an initial noise share: which one is taken, and that it is of their kind."""

from __future__ import annotations

from abc import abstractmethod
from os import PathLike
from typing import Any, ClassVar

from hfnoise.latents.hf_checkpoints import HUB_OPTIONS
from hfnoise.pipelines.auto_guided import AutoGuidedPipeline
from hfnoise.pipelines.guided import guided_class
from hfnoise.pipelines.initial_noise import InitialNoise, check_initial_noise
from hfnoise.pipelines.saved_parts import PipelineRepository, part_dtype

# All but the revision: it is another repository.
_DOWNLOAD_OPTIONS = tuple(name for name in HUB_OPTIONS if name != "revision")


class InitialNoisePreset(AutoGuidedPipeline):
    """Base of the presets that insist on an initial noise, which can be given by its network.

    A subclass names the argument of the network and says what it makes of it, and which members it is content with.
    """

    # The argument, short for an initial noise of that network, and where a repository has its weights.
    network: ClassVar[str]
    folder: ClassVar[str]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        guider: Any = None,
        initial_noise: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return the guided pipeline of a folder or Hub repository, with an initial noise.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): of a stock pipeline too.
            guider (*optional*): as in [`AutoGuidedPipeline.from_pretrained`].
            initial_noise ([`InitialNoise`] or a list of them, *optional*): instead of the saved one.
            kwargs: as in [`AutoGuidedPipeline.from_pretrained`]; the network, by the name that the class has for it,
                whose folder or repository is loaded with the `variant` and `dtype` of this call, its `token`,
                `cache_dir` and so on; and options of the initial noise, where the class takes them.

        Raises:
            TypeError: if no member of `initial_noise` is of the preset's kind.
            ValueError: if there is none at all, or both `initial_noise` and a network, or the pipeline cannot take it.
        """
        network = kwargs.pop(cls.network, None)
        changed, kwargs = cls._take_options(kwargs)
        options = {name: kwargs.get(name) for name in ("variant", "use_safetensors", *_DOWNLOAD_OPTIONS)}
        options["dtype"] = part_dtype(kwargs, cls.folder)
        noise, changed = cls._given(initial_noise, network, options, changed)
        pipe = super().from_pretrained(pretrained_model_name_or_path, guider, noise, **kwargs)
        if changed:
            pipe.initial_noise = cls._with_options(pipe.initial_noise, changed)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, *, initial_noise: Any = None, **kwargs: Any) -> Any:
        """Return the guided pipeline of the components of another one, with an initial noise.

        Args:
            pipeline: of diffusers, guided or not.
            initial_noise ([`InitialNoise`] or a list of them, *optional*): that of `pipeline` by default.
            kwargs: as in [`AutoGuidedPipeline.from_pipe`]; and the network, instead: a folder or repository is loaded
                in the dtype of the pipeline.

        Raises:
            TypeError: if no member of `initial_noise` is of the preset's kind.
            ValueError: if there is none at all, or the pipeline cannot take it.
        """
        network = kwargs.pop(cls.network, None)
        changed, kwargs = cls._take_options(kwargs)
        given, changed = cls._given(initial_noise, network, {"dtype": getattr(pipeline, "dtype", None)}, changed)
        noise = getattr(pipeline, "initial_noise", None) if given is None else given
        stock: Any = type(pipeline)
        noise = cls._checked(guided_class(stock), noise, stock.__name__)
        noise = cls._with_options(noise, changed) if changed else noise
        return super().from_pipe(pipeline, initial_noise=noise, **kwargs)

    @classmethod
    @abstractmethod
    def _of_network(cls, network: Any, options: dict[str, Any], changed: dict[str, Any]) -> InitialNoise:
        """Return the initial noise of a network, or of its folder or repository.

        Args:
            network: what was given.
            options (`dict`): to load it with.
            changed (`dict`): options of the initial noise, known while it is loaded: what they replace is not read.
        """

    @classmethod
    @abstractmethod
    def _check_kind(cls, noise: InitialNoise) -> None:
        """Raise TypeError if neither it nor a member of it is of the preset's kind."""

    @classmethod
    def _take_options(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return options of the initial noise among keyword arguments, and the others."""
        return {}, kwargs

    @classmethod
    def _with_options(cls, noise: InitialNoise, changed: dict[str, Any]) -> InitialNoise:
        """Return an initial noise with other options."""
        return noise

    @classmethod
    def _choose(cls, guided: type, repository: PipelineRepository, guider: Any, initial_noise: Any) -> tuple[Any, Any]:
        guider, noise = super()._choose(guided, repository, guider, initial_noise)
        return guider, cls._checked(guided, noise, repository.path)

    @classmethod
    def _given(
        cls, initial_noise: Any, network: Any, options: dict[str, Any], changed: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Return the initial noise of the arguments, and the options that are still to be set."""
        if network is None:
            return initial_noise, changed
        if initial_noise is not None:
            raise ValueError(f"give initial_noise or {cls.network}, which is short for an initial noise of it.")
        given = {name: value for name, value in options.items() if value is not None}
        return cls._of_network(network, given, changed), {}

    @classmethod
    def _checked(cls, pipeline_class: type, initial_noise: Any, place: str) -> InitialNoise:
        noise = check_initial_noise(pipeline_class, initial_noise)
        if noise is None:
            raise ValueError(
                f"{place} has no {cls.network}. Give {cls.network}=, a network or its repository, or initial_noise=."
            )
        cls._check_kind(noise)
        return noise
