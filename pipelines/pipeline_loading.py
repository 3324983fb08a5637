"""Find a pipeline by name and load it, with everything that can be refused refused before its weights are read."""

from __future__ import annotations

import inspect
import warnings
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.constants import HF_HUB_OFFLINE

from hfnoise.errors import UsageError
from hfnoise.pipelines.guided import guided_class
from hfnoise.pipelines.guider_checks import check_guider
from hfnoise.pipelines.guiders import AutoGuider
from hfnoise.pipelines.pipeline_layouts import layout_of
from hfnoise.worlds.pipeline_names import EMBEDDED

if TYPE_CHECKING:
    from hfnoise.pipelines.generate_config import GenerateConfig

# diffusers 0.42 calls the Hub's library with what it no longer knows.
_OLD_HUB_ARGUMENT = "The `local_dir_use_symlinks` argument is deprecated"


def find_pipeline_class(name: str, revision: str | None = None) -> Any:
    """Return the class of a pipeline, from its `model_index.json` alone.

    Args:
        name (`str`): as [`~hfnoise.worlds.pipeline_names.resolve_pipeline`] returned it.
        revision (`str`, *optional*): on the Hub.

    Raises:
        UsageError: if there is none, or it is of a class that diffusers does not have.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_OLD_HUB_ARGUMENT)
            config = DiffusionPipeline.load_config(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name!r} cannot be read: {_first_line(error)}{_hint(name)}") from error
    class_name = config.get("_class_name")
    found = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise UsageError(
            f"{name!r} is a {class_name!r}, which diffusers {diffusers.__version__} does not have. In Python load it "
            "as its card says, and use hfnoise.guide(pipe, guider)."
        )
    return found


def check_call(pipeline_class: Any, config: GenerateConfig, guider: Any) -> None:
    """Refuse what a pipeline cannot do with a configuration.

    Raises:
        UsageError: if it takes no prompt, or not an option that is given, or not this guider.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from hfnoise.pipelines.generate_config import GenerateConfig
        >>> from hfnoise.pipelines.pipeline_loading import check_call
        >>> check_call(StableDiffusionPipeline, GenerateConfig("digits", prompt=["seven"], num_frames=9), None)
        Traceback (most recent call last):
        ...
        hfnoise.errors.UsageError: StableDiffusionPipeline takes no num_frames: leave it out.
    """
    name = pipeline_class.__name__
    parameters = inspect.signature(pipeline_class.__call__).parameters
    if "prompt" not in parameters:
        raise UsageError(f"{name} takes no prompt: `hfnoise generate` draws from texts. Use hfnoise.guide in Python.")
    needed = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        and parameter.name not in ("self", "prompt")
    ]
    if needed:
        raise UsageError(f"{name} needs {needed[0]} beside a prompt: use hfnoise.guide in Python.")
    for option in ("negative_prompt", "num_inference_steps", "height", "width", "num_frames", "generator"):
        if option not in parameters and getattr(config, option, None) is not None:
            raise UsageError(f"{name} takes no {option}: leave it out.")
    layout = layout_of(pipeline_class)
    if guider is None and config.guidance_scale is not None and layout and layout.scale_name not in parameters:
        raise UsageError(f"{name} takes no guidance_scale: leave it out, or ask for a --guider.")
    try:
        check_guider(guided_class(pipeline_class), guider)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{error} (--guider none: the pipeline's own)") from error


def load_saved_guider(name: str, config: GenerateConfig) -> Any:
    """Return the guider that was saved with a pipeline, with the guidance scale of the configuration if it has one.

    Args:
        name (`str`): as [`~hfnoise.worlds.pipeline_names.resolve_pipeline`] returned it.
        config ([`GenerateConfig`]): for `revision` and `guidance_scale`.

    Raises:
        UsageError: if there is none.
    """
    more = {} if config.guidance_scale is None else {"guidance_scale": config.guidance_scale}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_OLD_HUB_ARGUMENT)
            return AutoGuider.from_pretrained(name, subfolder="guider", revision=config.revision, **more)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--guider saved: no guider/guider_config.json of {name!r} can be read: {_first_line(error)} Name the "
            "guider instead, as in --guider adaptive."
        ) from error


def load_pipeline(pipeline_class: Any, name: str, config: GenerateConfig) -> Any:
    """Return the pipeline, on its device and in its dtype.

    Args:
        pipeline_class (`type`): see [`find_pipeline_class`].
        name (`str`): as [`~hfnoise.worlds.pipeline_names.resolve_pipeline`] returned it.
        config ([`GenerateConfig`]): for `revision`, `dtype` and `device`.

    Raises:
        UsageError: if it cannot be loaded.
    """
    try:
        pipe = pipeline_class.from_pretrained(name, revision=config.revision, dtype=find_dtype(config))
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{name!r} cannot be loaded: {_first_line(error)}") from error
    return pipe.to(find_device(config.device))


def find_dtype(config: GenerateConfig) -> torch.dtype:
    """Return the dtype of the weights: the one of the configuration, or float32 on a CPU and bfloat16 elsewhere.

    Example:
        >>> from hfnoise.pipelines.generate_config import GenerateConfig
        >>> from hfnoise.pipelines.pipeline_loading import find_dtype
        >>> find_dtype(GenerateConfig("digits", prompt=["seven"], device="cpu"))
        torch.float32
    """
    usual = "float32" if find_device(config.device).type == "cpu" else "bfloat16"
    found: torch.dtype = getattr(torch, config.dtype or usual)
    return found


def find_device(name: str | None) -> torch.device:
    """Return the device of that name, or the accelerator, or the CPU.

    Raises:
        UsageError: if there is none of that name.

    Example:
        >>> from hfnoise.pipelines.pipeline_loading import find_device
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} cannot be used: {_first_line(error)}") from error
    if device.type == "meta":
        raise UsageError("device 'meta' computes nothing.")
    return device


def _hint(name: str) -> str:
    """Return what may be the cause: the Hub's library says only that the file was not found."""
    close = get_close_matches(name, EMBEDDED, n=1)
    if close:
        return f" Did you mean {close[0]}?"
    return " HF_HUB_OFFLINE is set: only what is in the cache can be loaded." if HF_HUB_OFFLINE else ""


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
