"""What one family of tiny pipelines is: how to build it, how to call it, how to switch its guidance off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# diffusers is imported inside the functions that build: its pipelines take seconds, which every collection would pay.

STEPS = 4
SCALE = 5.0


@dataclass(frozen=True)
class TinyFamily:
    """A real pipeline with tiny random weights.

    Args:
        name (`str`): of the family, such as `"sd-ddim"`.
        build (`Callable`): returns the pipeline: always the same weights, in evaluation mode, without progress bars.
        call (`Callable`): `call(count, first=0)` returns the arguments of a guided call for the samples `first` to
            `first + count - 1`. Sample `i` has the same prompt and noise whatever its neighbours are.
        unguided (`Mapping`): arguments that make such a call purely conditional.
        scale_name (`str`, defaults to `"guidance_scale"`): the argument that holds the scale of the guidance.
        guided (`bool`, defaults to `True`): false of distilled families, which have no branch without the condition.

    Example:
        >>> from hfnoise.worlds.tiny_pipelines import FAMILIES
        >>> FAMILIES["flux"].conditional_call(1)["true_cfg_scale"]
        1.0
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    call: Callable[..., dict[str, Any]]
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    scale_name: str = "guidance_scale"
    guided: bool = True

    def conditional_call(self, count: int, first: int = 0) -> dict[str, Any]:
        """Return the arguments of the purely conditional call for the same samples."""
        return {**self.call(count, first), **self.unguided}


def images_of(output: Any) -> torch.Tensor:
    """Return the images, the frames or the latents a pipeline returned: one row a sample."""
    for name in ("images", "frames"):
        if hasattr(output, name):
            return torch.as_tensor(getattr(output, name))
    raise TypeError(f"the output has neither images nor frames: {type(output).__name__} with {list(vars(output))}.")


def seeded(build: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """Return `build` with its weights always the same, the rest of the program's random numbers left alone."""

    @wraps(build)
    def quiet() -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = build()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return quiet


def spread_out(model: torch.nn.Module) -> torch.nn.Module:
    """Draw weights large enough that prompts matter: at the initial ones both predictions are nearly the same."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape) * 1.5 / fan_in**0.5)
    return model


def rows(seed: int, count: int, first: int, *shape: int) -> torch.Tensor:
    """Return one standard normal row a sample, of its own seed."""
    generators = (torch.Generator().manual_seed(1000 * seed + sample) for sample in range(first, first + count))
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def pictures(seed: int, count: int, first: int, *shape: int) -> torch.Tensor:
    """Return one picture a sample, in [0, 1]."""
    return rows(seed, count, first, *shape).sigmoid()


def shared_settings(count: int, first: int) -> dict[str, Any]:
    """Return what every call has: the number of steps, one fresh generator a sample, latents for output."""
    generators = [torch.Generator().manual_seed(100 + sample) for sample in range(first, first + count)]
    return {"num_inference_steps": STEPS, "generator": generators, "output_type": "latent"}


def prompts(
    length: int, width: int, pooled: int = 0, mask: str = "", mask_dtype: torch.dtype = torch.int64
) -> Callable[[int, int], dict[str, Any]]:
    """Return a function that makes the embeddings of the prompts and of the negative prompts, all different.

    Args:
        length (`int`): tokens of a prompt.
        width (`int`): of the embedding of a token.
        pooled (`int`, defaults to `0`): width of the pooled embeddings; 0 where the pipeline takes none.
        mask (`str`, defaults to `""`): what the arguments with the attention masks are called, without the prefix
            of the negative one; empty where the pipeline takes none.
        mask_dtype (`torch.dtype`, defaults to `torch.int64`): of the masks.
    """

    def embed(count: int, first: int) -> dict[str, Any]:
        arguments = {}
        for seed, prefix in enumerate(("", "negative_")):
            arguments[f"{prefix}prompt_embeds"] = rows(1 + seed, count, first, length, width)
            if pooled:
                arguments[f"{prefix}pooled_prompt_embeds"] = rows(3 + seed, count, first, pooled)
            if mask:
                # Of every two neighbours one prompt is shorter by a token, and not the one whose negative prompt is.
                samples = torch.arange(first, first + count)[:, None]
                arguments[f"{prefix}{mask}"] = (torch.arange(length) < length - (samples + seed) % 2).to(mask_dtype)
        return arguments

    return embed


def calls(*parts: Callable[[int, int], dict[str, Any]], **constants: Any) -> Callable[..., dict[str, Any]]:
    """Return a function of `count` and `first` that joins the shared settings, the parts and the constants."""

    def call(count: int, first: int = 0) -> dict[str, Any]:
        arguments = shared_settings(count, first)
        for part in parts:
            arguments |= part(count, first)
        return arguments | constants

    return call
