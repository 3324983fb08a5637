"""The one family of guided pipelines: any pipeline of diffusers with two slots more, `guider` and `initial_noise`."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.guiders import BaseGuidance

from hfnoise.pipelines.call_options import noise_of_call
from hfnoise.pipelines.guided_saving import GuidedSaving, stock_class
from hfnoise.pipelines.guider_base import UpdateGuidance
from hfnoise.pipelines.guider_checks import call_parameters, check_guider, check_run, own_scale, takes_guider
from hfnoise.pipelines.guider_options import described
from hfnoise.pipelines.guider_runs import running
from hfnoise.pipelines.initial_noise import InitialNoise, check_initial_noise, refined_start
from hfnoise.pipelines.interceptor import GuidedRun, outside
from hfnoise.pipelines.modular_start import refined_modular
from hfnoise.pipelines.pipeline_layouts import layout_of

if TYPE_CHECKING:
    from hfnoise.pipelines.guidance_report import GuidanceReport

logger = logging.getLogger(__name__)

PREFIX = "Guided"
# Within from_pipe of diffusers, which ends in a cast of everything to one dtype.
_KEEPS_DTYPE = ContextVar("_KEEPS_DTYPE", default=False)
# As long as they live: diffusers makes the class of a custom pipeline anew whenever it loads one.
_GUIDED: WeakValueDictionary[Any, Any] = WeakValueDictionary()


class GuidedPipeline(GuidedSaving):
    """What every guided pipeline has beside its own: the slots `guider` and `initial_noise`.

    Without them, and with settings that change nothing, it is the stock pipeline to the bit. Its `__call__` takes the
    same arguments; the guidance scale of the call beats the guider's, which beats the pipeline's default. It takes
    `initial_noise=` too, for this call in the place of the slot's (`[]` is none), and with a [`OneMoreStep`] its
    options for this call: `oms_eta`, `oms_guidance_scale`, `oms_prompt` and so on, and `oms_enabled=False`.
    """

    _initial_noise: InitialNoise | None = None

    @property
    def guider(self) -> UpdateGuidance | None:
        """How the pipeline is guided; `None` is its own classifier-free guidance."""
        # Where a pipeline that takes a guider itself has its own: it finds it there with or without us.
        return self.__dict__.get("guider")

    @guider.setter
    def guider(self, guider: UpdateGuidance | None) -> None:
        check_guider(type(self), guider)
        own = self.__dict__.get("guider")
        if own is not None and not isinstance(own, UpdateGuidance):
            # Of a pipeline that takes a guider itself: its default, for a guider of ours without a scale.
            self.__dict__["_own_guidance_scale"] = getattr(own, "guidance_scale", None)
        self.__dict__["guider"] = guider

    @property
    def initial_noise(self) -> InitialNoise | None:
        """What the pipeline starts from; `None` is its own noise."""
        return self._initial_noise

    @initial_noise.setter
    def initial_noise(self, initial_noise: InitialNoise | None) -> None:
        self._initial_noise = check_initial_noise(self, initial_noise)

    @property
    def guidance_report(self) -> GuidanceReport:
        """What the last call did: who stopped when, at which similarity, and what was saved.

        Raises:
            ValueError: if there is no guider, or no call yet.
        """
        if not isinstance(self.guider, UpdateGuidance):
            raise ValueError("this pipeline has no guider of hfnoise: set pipe.guider = hfnoise.AdaptiveGuidance().")
        return self.guider.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        initial_noise, kwargs = noise_of_call(self, kwargs)
        with ExitStack() as stack:
            if self.guider is not None:
                kwargs = stack.enter_context(_guided_call(self, self.guider, args, kwargs))
            if initial_noise is not None:
                stack.enter_context(refined_start(self, initial_noise, args, kwargs))
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers."""
        return self if _KEEPS_DTYPE.get() else super().to(*args, **kwargs)  # type: ignore[misc]

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

        Departure: the components keep their dtypes, where diffusers casts them, and with them those of the other
        pipeline, to float32 unless it is told.

        Args:
            pipeline: of diffusers.
            guider, initial_noise: the slots; those of `pipeline` by default. `initial_noise=[]` is none.
            kwargs: components to replace, and `dtype`, as in `DiffusionPipeline.from_pipe`.
        """
        if not kwargs and isinstance(pipeline, stock_class(cls)):
            made: Any = copy.copy(pipeline)
            made.__class__ = cls
        else:
            asked = _KEEPS_DTYPE.set(not {"dtype", "torch_dtype"} & set(kwargs))
            try:
                made = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
            finally:
                _KEEPS_DTYPE.reset(asked)
        made.guider = guider if guider is not None else getattr(pipeline, "guider", None)
        made.initial_noise = initial_noise if initial_noise is not None else getattr(pipeline, "initial_noise", None)
        return made


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
    if isinstance(pipeline_class, type) and issubclass(pipeline_class, ModularPipeline):
        raise TypeError(
            f"{pipeline_class.__name__} is modular and takes a guider itself: pipe.update_components(guider=guider), "
            "or hfnoise.guide(pipe, guider)."
        )
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)):
        is_pipe = isinstance(pipeline_class, DiffusionPipeline)
        wrong = "a pipeline: give type(pipe)" if is_pipe else described(pipeline_class).partition(":")[0]
        raise TypeError(f"guided_class takes a pipeline class of diffusers, got {wrong}.")
    if issubclass(pipeline_class, GuidedPipeline):
        return pipeline_class
    made = _GUIDED.get(pipeline_class)
    return made if made is not None else _GUIDED.setdefault(pipeline_class, _new_guided_class(pipeline_class))


def _new_guided_class(pipeline_class: Any) -> Any:
    stock_init = pipeline_class.__init__
    native = takes_guider(pipeline_class)

    @functools.wraps(stock_init)
    def __init__(self: Any, *args: Any, initial_noise: Any = None, **kwargs: Any) -> None:
        guider = None if native else kwargs.pop("guider", None)
        stock_init(self, *args, **kwargs)
        if not native:
            self.guider = guider
        self.initial_noise = initial_noise

    @functools.wraps(pipeline_class.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return GuidedPipeline.__call__(self, *args, **kwargs)

    name = PREFIX + pipeline_class.__name__
    members = {"__init__": __init__, "__call__": __call__, "__doc__": pipeline_class.__doc__, "__module__": __name__}
    return type(name, (GuidedPipeline, pipeline_class), members)


@contextmanager
def guide(
    pipe: Any, guider: UpdateGuidance | None = None, *, initial_noise: InitialNoise | None = None
) -> Iterator[Any]:
    """Within the block a pipeline of yours is guided; after it, it is what it was.

    Args:
        pipe: a pipeline of diffusers, classic or modular; a modular one keeps of its own what is not given.
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
        with refined_modular(pipe, initial_noise), _guided_modular(pipe, guider):
            yield pipe
        return
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(
            f"guide takes a pipeline of diffusers, got {described(pipe)}. Load one first: "
            "DiffusionPipeline.from_pretrained(...)."
        )
    stock: Any = type(pipe)
    guided = guided_class(stock)
    slots = ("guider", "_initial_noise", "_own_guidance_scale")
    before = {name: pipe.__dict__[name] for name in slots if name in pipe.__dict__}
    native = takes_guider(guided)
    guider = before.get("guider") if guider is None and native else guider
    check_guider(guided, guider)
    check_initial_noise(pipe, initial_noise)
    pipe.__class__ = guided
    pipe.guider, pipe.initial_noise = guider, initial_noise
    try:
        yield pipe
    finally:
        pipe.__class__ = stock
        if native:
            pipe.guider = before.get("guider")  # a component: its entry in the configuration goes along
        for name in slots:
            pipe.__dict__.pop(name, None)
        pipe.__dict__.update(before)


@contextmanager
def _bound(pipe: Any, guider: Any) -> Iterator[None]:
    """A call of a pipeline that calls the guider itself; none of these has an argument for the scale."""
    if not isinstance(guider, UpdateGuidance):
        yield
        return
    with running(guider, pipe):
        guider.guidance_scale = own_scale(pipe, guider)
        yield


@contextmanager
def _guided_modular(pipe: Any, guider: Any) -> Iterator[None]:
    """Within the block the guider is the pipeline's component of that name; without one it keeps its own."""
    if guider is None:
        yield
        return
    if "guider" not in pipe.component_names:
        raise ValueError(f"{type(pipe).__name__} does not take a guider.")
    if not isinstance(guider, BaseGuidance):
        raise TypeError(f"guide takes a guider of hfnoise or diffusers, got {described(guider)}.")
    before, source = pipe.guider, getattr(guider, "_source", None)
    pipe.update_components(guider=guider.bind(pipe) if isinstance(guider, UpdateGuidance) else guider)
    try:
        yield
    finally:
        pipe.update_components(guider=before)
        if isinstance(guider, UpdateGuidance):
            guider._source = source


@contextmanager
def _guided_call(
    pipe: Any, guider: UpdateGuidance, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the arguments of the call, with the scale of the guider where the call gives none."""
    layout = layout_of(type(pipe))
    assert layout is not None  # check_guider
    if layout.kind == "native":
        with _bound(pipe, guider):
            yield kwargs
        return
    parameters = call_parameters(type(pipe))
    # A subclass may hand its arguments on as **kwargs.
    signature = inspect.signature(stock_class(type(pipe)).__call__)
    given = {**signature.bind_partial(pipe, *args, **kwargs).arguments, **kwargs}
    name = layout.scale_name
    if name not in given and guider.asks_for_scale:
        kwargs = {**kwargs, name: guider.guidance_scale - layout.scale_offset}
    if guider.guidance_rescale and "guidance_rescale" not in given:
        kwargs = {**kwargs, "guidance_rescale": guider.guidance_rescale}
    is_given = name in given or name in kwargs
    for key in ("callback_on_step_end", "callback"):
        # Those of diffusers are recognised by their class, and call no model.
        if inspect.isroutine(kwargs.get(key)):
            kwargs = {**kwargs, key: outside(kwargs[key])}
    given = {**{key: parameter.default for key, parameter in parameters.items()}, **given, **kwargs}
    check_run(pipe, guider, given)

    def scale() -> float:
        # Callbacks may change it in mid-run. Pipelines without this property decide once, and CogVideoX among them
        # (use_dynamic_cfg) writes down the scale of a step after its evaluation.
        live = hasattr(type(pipe), name) and hasattr(type(pipe), "do_classifier_free_guidance")
        value = getattr(pipe, name) if live else given[name]
        return float(value) + layout.scale_offset

    asked = given[name] is not None and given[name] + layout.scale_offset > 1
    if not (asked or is_given) and guider.num_conditions > 1:
        logger.warning(
            "%s guides nothing unless asked to, so %s has nothing to do: give %s above 1, and a negative prompt.",
            type(pipe).__name__, type(guider).__name__, name,
        )  # fmt: skip
    if layout.kind == "three_branches":  # these have a scale of the image too
        asked = asked and given["image_guidance_scale"] >= 1
    with GuidedRun(pipe, guider, layout, scale, asked).installed():
        yield kwargs


def __getattr__(name: str) -> Any:
    stock = getattr(diffusers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, DiffusionPipeline):
        return guided_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it has {PREFIX} + a pipeline of diffusers.")
