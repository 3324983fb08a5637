"""A start that is brighter or darker by a chosen amount."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor


def brightness_estimate(value: float, direction: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """Return a constant x0_hat, `value` times what one unit of brightness is in latents, in float32.

    Ours: the mean of the images that One More Step learns per prompt, given by hand. A base model reads the mean of
    an image from its start almost without error, so that a start about `value` gives images about `value`.

    Args:
        value (`float`): in [-1, 1], from black to white.
        direction (sequence of `float`, one a channel): latent mean of a white image minus that of a grey one.
        like (`torch.Tensor` of shape `(batch, channels, ...)`): the latents.

    Raises:
        ValueError: if the value is out of range, or there is not one number a channel.

    Example:
        >>> import torch
        >>> from hfnoise.latents import brightness_estimate
        >>> brightness_estimate(0.5, [1.0, -1.0], torch.zeros(1, 2, 1, 1)).flatten()
        tensor([ 0.5000, -0.5000])
    """
    check_brightness(value)
    channels = torch.as_tensor(direction, dtype=torch.float32, device=like.device).flatten()
    if len(channels) != like.shape[1]:
        raise ValueError(f"the direction has {len(channels)} numbers, and the latents {like.shape[1]} channels.")
    return (value * channels).reshape(1, -1, *[1] * (like.dim() - 2)).expand(like.shape)


def check_brightness(value: float) -> None:
    """Raise ValueError unless the value is in [-1, 1].

    Example:
        >>> from hfnoise.latents.brightness import check_brightness
        >>> check_brightness(-1)
    """
    if not isinstance(value, Real) or not -1.0 <= value <= 1.0:
        raise ValueError(f"a brightness (value) is in [-1, 1], black to white, with 0 for no change; got {value!r}.")
