"""What one call of a guided pipeline starts from: `pipe(prompt, initial_noise=...)`, `pipe(prompt, oms_eta=0.5)`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfnoise.pipelines.initial_noise import InitialNoise, check_initial_noise
from hfnoise.pipelines.noise_chain import InitialNoiseChain, members_of

if TYPE_CHECKING:
    from hfnoise.pipelines.one_more_step import OneMoreStep

# Of options of One More Step, among arguments that are the pipeline's own.
OMS_PREFIX = "oms_"


def noise_of_call(pipe: Any, kwargs: dict[str, Any]) -> tuple[InitialNoise | None, dict[str, Any]]:
    """Return what a call starts from, and the arguments that are the pipeline's own.

    Stable Diffusion's call takes any name and drops those that it does not know, so that they would be lost there.

    Args:
        pipe: guided.
        kwargs (`dict`): of its call: `initial_noise` in the place of the slot's (`[]` is none), and options of
            [`OneMoreStep`] with `oms_` before their names.

    Raises:
        TypeError: for an option that [`OneMoreStep`] does not have.
        ValueError: if there is no [`OneMoreStep`] that it could be of.
    """
    given, kwargs = take_oms_options(kwargs)
    noise = pipe.initial_noise
    if "initial_noise" in kwargs:
        kwargs = dict(kwargs)
        asked = kwargs.pop("initial_noise")
        noise = noise if asked is None else check_initial_noise(pipe, asked)
    return (with_oms_options(noise, given) if given else noise), kwargs


def take_oms_options(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of [`OneMoreStep`] among keyword arguments, by the names that they have there, and the rest.

    `oms_enabled=False` is `scale=0.0`; True is nothing.

    Raises:
        TypeError: for an option that [`OneMoreStep`] does not have.

    Example:
        >>> from hfnoise.pipelines.call_options import take_oms_options
        >>> take_oms_options({"oms_eta": 0.5, "oms_enabled": False, "height": 512})
        ({'eta': 0.5, 'scale': 0.0}, {'height': 512})
    """
    asked = {name: value for name, value in kwargs.items() if name.startswith(OMS_PREFIX)}
    if not asked:
        return {}, dict(kwargs)
    from hfnoise.pipelines.one_more_step import OneMoreStep

    options = {name.removeprefix(OMS_PREFIX): value for name, value in asked.items()}
    enabled = options.pop("enabled", True)
    if not isinstance(enabled, bool):
        raise TypeError(f"oms_enabled must be True or False, got {enabled!r}.")
    known = [name for name in inspect.signature(OneMoreStep).parameters if name != "module"]
    if unknown := sorted(set(options) - set(known)):
        names = ", ".join(OMS_PREFIX + name for name in unknown)
        raise TypeError(f"One More Step has no option {names}; it has oms_enabled, oms_{', oms_'.join(known)}.")
    if not enabled:
        options["scale"] = 0.0
    return options, {name: value for name, value in kwargs.items() if name not in asked}


def with_oms_options(initial_noise: InitialNoise | None, options: Mapping[str, Any]) -> InitialNoise:
    """Return an initial noise whose [`OneMoreStep`] has other options; the one that is given stays as it is.

    Args:
        initial_noise ([`InitialNoise`]): alone or a chain.
        options (`Mapping`): of [`OneMoreStep`], without prefix.

    Raises:
        ValueError: if there is no [`OneMoreStep`], or an option is out of its range.

    Example:
        >>> from hfnoise.pipelines import OneMoreStep
        >>> from hfnoise.pipelines.call_options import with_oms_options
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> step = OneMoreStep(new_digits_pipeline(width=8).unet)
        >>> with_oms_options(step, {"eta": 0.5}).eta, step.eta
        (0.5, 0.0)
    """
    steps = one_more_steps(initial_noise)
    if not steps:
        names = ", ".join(OMS_PREFIX + name for name in options)
        raise ValueError(
            f"{names} is for One More Step, and the initial noise is "
            f"{'none' if initial_noise is None else type(initial_noise).__name__}. Give the pipeline one: "
            "OneMoreStepPipeline.from_pipe(pipe, oms_module=...)."
        )
    if not isinstance(initial_noise, InitialNoiseChain):
        return steps[0].with_options(**options)
    return InitialNoiseChain(
        member.with_options(**options) if any(member is step for step in steps) else member  # type: ignore[attr-defined]
        for member in initial_noise.members
    )


def one_more_steps(initial_noise: InitialNoise | None) -> list[OneMoreStep]:
    """Return the members of an initial noise that are One More Step.

    Example:
        >>> from hfnoise.pipelines import BrightnessOffset
        >>> from hfnoise.pipelines.call_options import one_more_steps
        >>> one_more_steps(BrightnessOffset(0.5))
        []
    """
    from hfnoise.pipelines.one_more_step import OneMoreStep

    return [member for member in members_of(initial_noise) if isinstance(member, OneMoreStep)]
