"""Latents as rows of tokens, as Flux and its kin keep them, and as images."""

from __future__ import annotations

from torch import Tensor

# Latent pixels of a token in each direction: of Flux, Chroma, Qwen-Image and Flux 2.
PATCH = 2


def pack_latents(latents: Tensor) -> Tensor:
    """Return images of latents as tokens: 2 x 2 pixels of all channels are one.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): of even height and width.

    Returns:
        `torch.Tensor` of shape `(batch, height * width / 4, 4 * channels)`.

    Raises:
        ValueError: for another shape.

    Example:
        >>> import torch
        >>> from hfnoise.latents import pack_latents, unpack_latents
        >>> latents = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> pack_latents(latents)[0, 0]
        tensor([0., 1., 4., 5.])
        >>> torch.equal(unpack_latents(pack_latents(latents), 4, 4), latents)
        True
    """
    if latents.dim() != 4 or latents.shape[2] % PATCH or latents.shape[3] % PATCH:
        raise ValueError(f"needed are latents of shape (batch, channels, even, even), got {tuple(latents.shape)}.")
    batch, channels, height, width = latents.shape
    split = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // PATCH**2, channels * PATCH**2)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return the opposite of [`pack_latents`].

    Args:
        tokens (`torch.Tensor` of shape `(batch, height * width / 4, 4 * channels)`).
        height, width (`int`): of the latents, even.

    Raises:
        ValueError: if the numbers do not match.
    """
    fits = tokens.dim() == 3 and tokens.shape[1] * PATCH**2 == height * width and tokens.shape[2] % PATCH**2 == 0
    if not fits or height % PATCH or width % PATCH:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} are no latents of {height} x {width}: needed are (batch, height * "
            "width / 4, 4 * channels)."
        )
    batch, _, width_of_token = tokens.shape
    channels = width_of_token // PATCH**2
    split = tokens.reshape(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)
