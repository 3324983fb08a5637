"""Latents as images, however a pipeline keeps them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hfnoise.latents import pack_latents, unpack_latents
from hfnoise.latents.packing import PATCH
from hfnoise.pipelines.start_context import StartContext


@dataclass(frozen=True)
class LatentSpace:
    """Between the latents of a pipeline and images of latents, `(batch, channels, height, width)`.

    Stable Diffusion, XL (4 channels) and 3 (16) keep images, videos have frames too; both stay what they are. Flux,
    Chroma, Qwen-Image and their kin keep tokens of 2 x 2 pixels.

    Args:
        shape (`tuple[int, ...]`): of one sample, unpacked.
        packed (`bool`, defaults to `False`): whether the pipeline keeps tokens.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.latent_space import LatentSpace
        >>> space = LatentSpace((16, 8, 8), packed=True)
        >>> tokens = torch.zeros(2, 16, 64)
        >>> space.unpack(tokens).shape, space.pack(space.unpack(tokens)).shape
        (torch.Size([2, 16, 8, 8]), torch.Size([2, 16, 64]))
    """

    shape: tuple[int, ...]
    packed: bool = False

    @classmethod
    def of(cls, context: StartContext, latents: Tensor) -> LatentSpace:
        """Return the space of a call's latents.

        Args:
            context ([`StartContext`]): of the call.
            latents (`torch.Tensor`): as the pipeline prepared them.

        Raises:
            ValueError: if they are tokens of a height and width that are not known.
        """
        shape = tuple(latents.shape[1:])
        if len(shape) != 2 or not hasattr(type(context.pipe), "_pack_latents") or "num_frames" in context.prepared:
            return cls(shape)
        height, width = (context.prepared.get(name) for name in ("height", "width"))
        if not (isinstance(height, int) and isinstance(width, int)) or shape[1] % PATCH**2:
            raise ValueError(
                f"{context.name} keeps latents as tokens of shape {shape}, and their height and width are not known: "
                "a call with one image of its own size is needed."
            )
        # Sides are rounded down to whole tokens: some width of a token makes just these rows and columns.
        fits = [
            (rows, columns)
            for rows, columns in ((rows, shape[0] // rows) for rows in range(1, shape[0] + 1) if shape[0] % rows == 0)
            if max(height / (rows + 1), width / (columns + 1)) < min(height / rows, width / columns)
        ]
        if not fits:
            raise ValueError(
                f"{context.name} keeps {shape[0]} tokens for an image of {height} x {width}: these are no rows and "
                "columns of it."
            )
        rows, columns = min(fits, key=lambda sides: abs(math.log(sides[0] * width / (sides[1] * height))))
        return cls((shape[1] // PATCH**2, rows * PATCH, columns * PATCH), packed=True)

    def unpack(self, latents: Tensor) -> Tensor:
        """Return latents of the pipeline as `(batch, *shape)`.

        Raises:
            ValueError: if they have no rows and columns.
        """
        if len(self.shape) < 3:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} have no rows and columns that are known: they cannot be "
                "treated as an image."
            )
        return unpack_latents(latents, *self.shape[1:]) if self.packed else latents

    def pack(self, images: Tensor) -> Tensor:
        """Return the opposite of [`LatentSpace.unpack`]."""
        return pack_latents(images) if self.packed else images
