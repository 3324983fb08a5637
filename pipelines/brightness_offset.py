"""Brighter or darker images without a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfnoise.guidance.number_check import check_number
from hfnoise.latents import brightness_estimate
from hfnoise.latents.brightness import check_brightness
from hfnoise.pipelines.start_context import StartContext
from hfnoise.pipelines.start_estimate import Estimate, StartEstimate

# Of a flat image each side, in pixels of the latents: enough that its middle does not see the edge.
_FLAT_SIZE = 16


class BrightnessOffset(StartEstimate):
    """Starts from a flat grey of a chosen brightness, with the noise of the first step on it. Needs no training.

    Ours. Models of the Stable Diffusion family read the brightness of an image from their start almost without error,
    and white noise tells them mid-grey; see [`OneMoreStep`], which learns from the prompt what this is told. Behind a
    [`OneMoreStep`] it shifts its estimate.

    Args:
        value (`float`): in [-1, 1]: -1 is black, 1 white, 0 no change.
        direction (sequence of `float`, *optional*): one number a channel of the latents, what one unit of brightness
            is in them; measured once on the VAE of the pipeline by default, with a white and a grey image.

    Raises:
        ValueError: if the value is out of range, or the direction is no list of numbers.

    Example:
        >>> from hfnoise.pipelines import BrightnessOffset
        >>> BrightnessOffset(0.0).is_off
        True
    """

    def __init__(self, value: float, direction: Sequence[float] | None = None) -> None:
        check_number("value", value)
        check_brightness(value)
        self.value = value
        self.direction = None if direction is None else _numbers(direction)
        self._measured: tuple[Any, Tensor] | None = None

    @property
    def is_off(self) -> bool:
        """Whether it changes nothing."""
        return self.value == 0.0

    def to_config(self) -> dict[str, Any]:
        """Return the options; a direction that was measured is measured again on the VAE that is loaded."""
        return {"value": float(self.value), "direction": None if self.direction is None else list(self.direction)}

    def estimate(self, noise: Tensor, context: StartContext) -> Estimate:
        """Return the latents of a flat image, minus those of mid-grey."""
        direction = self.direction if self.direction is not None else self._measure(context)
        return Estimate(brightness_estimate(self.value, direction, noise), noise)

    def _measure(self, context: StartContext) -> Tensor:
        vae = getattr(context.pipe, "vae", None)
        if vae is None or getattr(vae.config, "scaling_factor", None) is None:
            raise ValueError(
                f"{context.name} has no VAE with a scaling factor, so it is not known what brightness is in its "
                "latents. Give BrightnessOffset(value, direction=[one number a channel])."
            )
        if self._measured is None or self._measured[0] is not vae:
            direction = brightness_direction(vae)
            if not bool(torch.isfinite(direction).all()):
                raise ValueError(
                    f"the VAE of {context.name} encodes white and grey to NaN or infinity in {vae.dtype}. Load it in "
                    "float32 or bfloat16, or give BrightnessOffset(value, direction=[one number a channel])."
                )
            self._measured = (vae, direction)
        return self._measured[1]

    def __repr__(self) -> str:
        return f"BrightnessOffset({self.value}, direction={self.direction})"


def _numbers(direction: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = () if isinstance(direction, (str, bytes)) else tuple(float(entry) for entry in direction)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"direction must be one finite number a channel of the latents, got {direction!r}.")
    return numbers


def brightness_direction(vae: Any) -> Tensor:
    """Return the latent mean of a white image minus that of a grey one, one number a channel, in float32.

    Args:
        vae (`AutoencoderKL` or alike): with a scaling factor; a shift has no part in a difference.

    Example:
        >>> from hfnoise.pipelines.brightness_offset import brightness_direction
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> brightness_direction(new_digits_pipeline(width=8).vae).shape
        torch.Size([4])
    """
    factor = 2 ** (len(getattr(vae.config, "block_out_channels", None) or [0] * 4) - 1)
    side = _FLAT_SIZE * factor
    dtype = vae.dtype
    # The VAE of SDXL overflows in half precision, and says so.
    widened = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if widened:
        vae.to(torch.float32)
    try:
        shades = torch.tensor([1.0, 0.0], device=vae.device, dtype=vae.dtype).reshape(2, 1, 1, 1)
        images = shades.expand(2, getattr(vae.config, "in_channels", 3), side, side)
        with torch.no_grad():
            encoded = vae.encode(images)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    finally:
        if widened:
            vae.to(dtype)
    edge = _FLAT_SIZE // 4
    means = latents.float()[..., edge:-edge, edge:-edge].mean((-2, -1))
    return (means[0] - means[1]) * vae.config.scaling_factor
