"""The one family of guided pipelines: any pipeline of diffusers with two slots more, `guider` and `initial_noise`."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline

from hfnoise.pipelines.guider_base import UpdateGuidance
from hfnoise.pipelines.guider_checks import check_guider
from hfnoise.pipelines.initial_noise import InitialNoise, check_initial_noise, refined_start
from hfnoise.pipelines.interceptor import GuidedRun
from hfnoise.pipelines.pipeline_layouts import layout_of

if TYPE_CHECKING:
    from hfnoise.pipelines.guidance_report import GuidanceReport

PREFIX = "Guided"


class GuidedPipeline:
    """What every guided pipeline has beside its own: the slots `guider` and `initial_noise`.

    Without them, and with settings that change nothing, it is the stock pipeline to the bit. Its `__call__` takes the
    same arguments; the guidance scale of the call beats the guider's, which beats the pipeline's default.
    """

    _guider: UpdateGuidance | None = None
    _initial_noise: InitialNoise | None = None

    @property
    def guider(self) -> UpdateGuidance | None:
        """How the pipeline is guided; `None` is its own classifier-free guidance."""
        return self._guider

    @guider.setter
    def guider(self, guider: UpdateGuidance | None) -> None:
        check_guider(type(self), guider)
        self._guider = guider

    @property
    def initial_noise(self) -> InitialNoise | None:
        """What the pipeline starts from; `None` is its own noise."""
        return self._initial_noise

    @initial_noise.setter
    def initial_noise(self, initial_noise: InitialNoise | None) -> None:
        self._initial_noise = check_initial_noise(type(self), initial_noise)

    @property
    def guidance_report(self) -> GuidanceReport:
        """What the last call did: who stopped when, at which similarity, and what was saved.

        Raises:
            ValueError: if there is no guider, or no call yet.
        """
        if self._guider is None:
            raise ValueError("this pipeline has no guider: set pipe.guider = hfnoise.AdaptiveGuidance().")
        return self._guider.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            if self._guider is not None:
                kwargs = stack.enter_context(_guided_call(self, self._guider, args, kwargs))
            if self._initial_noise is not None:
                stack.enter_context(refined_start(self, self._initial_noise, args, kwargs))
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        *,
        guider: UpdateGuidance | None = None,
        initial_noise: InitialNoise | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return this pipeline of the components of another one, without a copy of them.

        Departure: the components keep their dtype, where diffusers casts them to float32 unless it is told.

        Args:
            pipeline: of diffusers.
            guider, initial_noise: the slots; those of `pipeline` by default.
            kwargs: components to replace, and `dtype`, as in `DiffusionPipeline.from_pipe`.
        """
        if not kwargs and isinstance(pipeline, stock_class(cls)):
            made: Any = copy.copy(pipeline)
            made.__class__ = cls
        else:
            if "dtype" not in kwargs and "torch_dtype" not in kwargs:
                kwargs["dtype"] = pipeline.dtype
            made = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        made.guider = guider if guider is not None else getattr(pipeline, "guider", None)
        made.initial_noise = initial_noise if initial_noise is not None else getattr(pipeline, "initial_noise", None)
        return made


@functools.cache
def guided_class(pipeline_class: Any) -> Any:
    """Return a pipeline class with the slots `guider` and `initial_noise`, named `Guided` + its name.

    Args:
        pipeline_class (`type`): a pipeline of diffusers, or a subclass of one.

    Raises:
        TypeError: if it is none. ModularPipeline takes a guider itself: `pipe.update_components(guider=guider)`.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from hfnoise.pipelines import guided_class
        >>> guided_class(StableDiffusionPipeline).__name__
        'GuidedStableDiffusionPipeline'
    """
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)):
        raise TypeError(f"guided_class takes a pipeline class of diffusers, got {pipeline_class!r}.")
    if issubclass(pipeline_class, ModularPipeline):
        raise TypeError(
            f"{pipeline_class.__name__} is modular and takes a guider itself: pipe.update_components(guider=guider), "
            "or hfnoise.guide(pipe, guider)."
        )
    if issubclass(pipeline_class, GuidedPipeline):
        return pipeline_class
    stock_init = pipeline_class.__init__

    @functools.wraps(stock_init)
    def __init__(self: Any, *args: Any, guider: Any = None, initial_noise: Any = None, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        self.guider = guider
        self.initial_noise = initial_noise

    @functools.wraps(pipeline_class.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return GuidedPipeline.__call__(self, *args, **kwargs)

    name = PREFIX + pipeline_class.__name__
    members = {"__init__": __init__, "__call__": __call__, "__doc__": pipeline_class.__doc__, "__module__": __name__}
    return type(name, (GuidedPipeline, pipeline_class), members)


def stock_class(guided: type) -> type:
    """Return the pipeline class of diffusers that a guided one is made of.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from hfnoise.pipelines.guided import guided_class, stock_class
        >>> stock_class(guided_class(StableDiffusionPipeline)).__name__
        'StableDiffusionPipeline'
    """
    return next(base for base in guided.__mro__ if not issubclass(base, GuidedPipeline))


@contextmanager
def guide(
    pipe: Any, guider: UpdateGuidance | None = None, *, initial_noise: InitialNoise | None = None
) -> Iterator[Any]:
    """Within the block a pipeline of yours is guided; after it, it is what it was.

    Args:
        pipe: a pipeline of diffusers, classic or modular.
        guider ([`AdaptiveGuidance`], [`ProjectedGuidance`] or [`LinearGuidance`], *optional*): how.
        initial_noise ([`InitialNoise`], *optional*): what it starts from.

    Raises:
        TypeError, ValueError: if the pipeline cannot take them, before anything is changed.

    Example:
        >>> import hfnoise
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe = new_digits_pipeline(width=8)
        >>> with hfnoise.guide(pipe, hfnoise.AdaptiveGuidance(threshold=0.99)):
        ...     _ = pipe("the digit seven", num_inference_steps=4)
        ...     print(pipe.guidance_report.batch)
        1
    """
    if isinstance(pipe, ModularPipeline):
        with _guided_modular(pipe, guider, initial_noise):
            yield pipe
        return
    stock: Any = type(pipe)
    before = stock, pipe.__dict__.get("_guider"), pipe.__dict__.get("_initial_noise")
    guided = guided_class(stock)
    check_guider(guided, guider)
    check_initial_noise(guided, initial_noise)
    pipe.__class__ = guided
    pipe.guider, pipe.initial_noise = guider, initial_noise
    try:
        yield pipe
    finally:
        pipe.__class__ = before[0]
        for name, value in zip(("_guider", "_initial_noise"), before[1:], strict=True):
            pipe.__dict__.pop(name, None)
            if value is not None:
                pipe.__dict__[name] = value


@contextmanager
def _guided_modular(pipe: Any, guider: Any, initial_noise: Any) -> Iterator[None]:
    if initial_noise is not None or "guider" not in pipe.component_names:
        missing = "initial_noise" if initial_noise is not None else "a guider"
        raise ValueError(f"{type(pipe).__name__} does not take {missing}.")
    before = pipe.guider
    pipe.update_components(guider=guider.bind(pipe) if isinstance(guider, UpdateGuidance) else guider)
    try:
        yield
    finally:
        pipe.update_components(guider=before)


@contextmanager
def _guided_call(
    pipe: Any, guider: UpdateGuidance, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the arguments of the call, with the scale of the guider where the call gives none."""
    layout = layout_of(type(pipe))
    assert layout is not None  # check_guider
    signature = inspect.signature(stock_class(type(pipe)).__call__)
    given = signature.bind_partial(pipe, *args, **kwargs).arguments
    name = layout.scale_name
    if name not in given and guider.asks_for_scale:
        kwargs = {**kwargs, name: guider.guidance_scale - layout.scale_offset}
    if guider.guidance_rescale and "guidance_rescale" not in given:
        kwargs = {**kwargs, "guidance_rescale": guider.guidance_rescale}
    parameter = signature.parameters.get(name)
    default = None if parameter is None else parameter.default
    asked: Any = kwargs.get(name, given.get(name, default))

    def scale() -> float:
        # Callbacks may change it in mid-run.
        value = getattr(pipe, name, asked) if hasattr(type(pipe), name) else asked
        return float(value) + layout.scale_offset

    with GuidedRun(pipe, guider, layout, scale).installed():
        yield kwargs


def __getattr__(name: str) -> Any:
    stock = getattr(diffusers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, DiffusionPipeline):
        return guided_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it has {PREFIX} + a pipeline of diffusers.")
