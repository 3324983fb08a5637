"""A call of a pipeline beside the one that is running, which is stopped when it has told what it was asked for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfnoise.pipelines.guided_saving import stock_class

if TYPE_CHECKING:
    from hfnoise.pipelines.initial_noise import InitialNoise

# What a running call may have put onto the pipeline itself.
_METHODS_OF_A_CALL = ("encode_prompt", "prepare_latents", "prepare_intermediate_images")


class SideRunStopped(BaseException):
    """Ends a side run. No `Exception`: what a pipeline does about errors does not apply."""


def side_pipeline(pipe: Any) -> Any:
    """Return the stock pipeline of the same modules, with a scheduler of its own and without progress bar.

    Its calls leave the scheduler, the attributes and the running call of the pipeline as they are.

    Example:
        >>> from hfnoise.pipelines.side_run import side_pipeline
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe = new_digits_pipeline(width=8)
        >>> side = side_pipeline(pipe)
        >>> side.unet is pipe.unet, side.scheduler is pipe.scheduler
        (True, False)
    """
    side = copy.copy(pipe)
    side.__class__ = stock_class(type(pipe))
    for name in _METHODS_OF_A_CALL:
        side.__dict__.pop(name, None)
    # Past diffusers' own __setattr__, which would write to the configuration that both share.
    side.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
    side.__dict__["_progress_bar_config"] = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    return side


def guided_side_pipeline(pipe: Any, initial_noise: InitialNoise | None) -> Any:
    """Return a [`side_pipeline`] that is guided as the pipeline is, and starts from what it is given.

    Its guider is one of its own, so that the report of the pipeline's is of the pipeline's run. Call it within
    [`~hfnoise.pipelines.interceptor.beside`] while the pipeline is running.

    Args:
        pipe: of diffusers, guided or not.
        initial_noise ([`InitialNoise`], *optional*): for the slot, in place of what the pipeline has there.

    Example:
        >>> from hfnoise.pipelines import BrightnessOffset
        >>> from hfnoise.pipelines.side_run import guided_side_pipeline
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> guided_side_pipeline(new_digits_pipeline(width=8), BrightnessOffset(0.5)).initial_noise
        BrightnessOffset(0.5, direction=None)
    """
    # guided.py itself uses what makes side runs.
    from hfnoise.pipelines.guided import guided_class

    side = side_pipeline(pipe)
    stock: Any = type(side)
    side.__class__ = guided_class(stock)
    guider = pipe.__dict__.get("guider")
    if guider is not None:
        side.__dict__["guider"] = _own_guider(guider)
    side.__dict__["_initial_noise"] = initial_noise
    # At the end of a call it would move the models of the running one away.
    side.__dict__["maybe_free_model_hooks"] = lambda: None
    return side


def _own_guider(guider: Any) -> Any:
    twin = copy.copy(guider)
    # What a run appends to; the rest it sets anew.
    twin.__dict__.update({name: list(value) for name, value in vars(guider).items() if isinstance(value, list)})
    if getattr(guider, "inner", None) is not None:
        twin.__dict__["inner"] = _own_guider(guider.inner)
    return twin


def per_prompt(call: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return arguments of a call of several prompts, with a negative prompt for each where one was given for all.

    Pipelines of Stable Diffusion refuse one text beside several.

    Example:
        >>> from hfnoise.pipelines.side_run import per_prompt
        >>> per_prompt({"negative_prompt": "blurry", "num_inference_steps": 4}, 2)
        {'negative_prompt': ['blurry', 'blurry'], 'num_inference_steps': 4}
    """
    return {
        name: [value] * count if name.startswith("negative_prompt") and isinstance(value, str) else value
        for name, value in call.items()
    }
