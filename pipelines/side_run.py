"""A call of a pipeline beside the one that is running, which is stopped when it has told what it was asked for."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hfnoise.pipelines.guided_saving import stock_class

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


def without_start(pipe: Any) -> Any:
    """Return the pipeline with nothing in the slot `initial_noise`: the same modules, scheduler and guider.

    Example:
        >>> from hfnoise.pipelines import ReDenoise, guide
        >>> from hfnoise.pipelines.side_run import without_start
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe = new_digits_pipeline(width=8)
        >>> with guide(pipe, initial_noise=ReDenoise()):
        ...     without_start(pipe).initial_noise is None, pipe.initial_noise is None
        (True, False)
    """
    if getattr(pipe, "initial_noise", None) is None:
        return pipe
    plain = copy.copy(pipe)
    plain.__dict__["_initial_noise"] = None
    return plain


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


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Within the block the random numbers of the program, on the CPU and a device, are drawn without being used up."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if device.type == "mps":  # it has one state for all
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        elif device.type != "cpu":
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        yield
