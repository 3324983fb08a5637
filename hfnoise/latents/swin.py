"""Swin Transformer (arXiv 2103.14030) without a classifier: the backbone of NPNet's residual branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What timm and the official code of Swin add to the logits of pairs that lie in different parts of a shifted window.
_APART = -100.0


class SwinTransformer(nn.Module):
    """Returns features of images, channels last; parameters have the names of timm's `SwinTransformer`.

    Shifted windows of attention, and patches merged 2 x 2 before each stage but the first (the names of timm >= 0.9;
    older ones count that merging to the stage before). Without drop path: the same images give the same features in
    training too.

    Args:
        image_size (`int`, defaults to `224`): side of the images; a multiple of `patch_size * window_size *
            2 ** (stages - 1)`, or `window_size` times less where the last stage has a smaller window.
        patch_size (`int`, defaults to `4`): side of a patch.
        embed_dim (`int`, defaults to `96`): channels of the first stage; each further one has twice.
        depths, num_heads (sequences of `int`): blocks and heads of each stage; those of `swin_tiny` by default.
        window_size (`int`, defaults to `7`): side of a window.
        in_channels (`int`, defaults to `3`): of the images.

    Raises:
        ValueError: if the sizes do not fit each other.

    Example:
        >>> import torch
        >>> from hfnoise.latents.swin import SwinTransformer
        >>> swin = SwinTransformer(16, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2)
        >>> swin(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 2, 2, 16])
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads) or not depths:
            raise ValueError(f"depths and num_heads need an entry for each stage, got {depths} and {num_heads}.")
        least = patch_size * window_size * 2 ** (len(depths) - 1)
        if image_size % least:
            raise ValueError(
                f"image_size must be a multiple of {least} (patch_size {patch_size} x window_size {window_size} x "
                f"2 ** {len(depths) - 1}), got {image_size}."
            )
        for stage, heads in enumerate(num_heads):
            if (embed_dim * 2**stage) % heads:
                raise ValueError(
                    f"stage {stage} has {embed_dim * 2**stage} channels, which {heads} heads cannot share."
                )
        self.patch_embed = _PatchEmbedding(in_channels, embed_dim, patch_size)
        self.layers = nn.ModuleList(
            _Stage(embed_dim * 2**stage, depth, heads, window_size, merges=stage > 0)
            for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True))
        )
        self.norm = nn.LayerNorm(embed_dim * 2 ** (len(depths) - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised features of the last stage, `(batch, height, width, channels)`."""
        features = self.patch_embed(images)
        for stage in self.layers:
            features = stage(features)
        normed: Tensor = self.norm(features)
        return normed


class _PatchEmbedding(nn.Module):
    def __init__(self, in_channels: int, channels: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        embedded: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return embedded


class _PatchMerging(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * channels)
        self.reduction = nn.Linear(2 * channels, channels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        batch, height, width, channels = features.shape
        blocks = features.reshape(batch, height // 2, 2, width // 2, 2, channels)
        # The column of a block changes slower than its row: the order of the official weights.
        merged: Tensor = self.reduction(self.norm(blocks.permute(0, 1, 3, 4, 2, 5).flatten(3)))
        return merged


class _Stage(nn.Module):
    def __init__(self, channels: int, depth: int, heads: int, window: int, merges: bool) -> None:
        super().__init__()
        # `channels` are those after the merging, which makes 4 c of four patches and keeps 2 c.
        self.downsample = _PatchMerging(channels) if merges else nn.Identity()
        self.blocks = nn.ModuleList(
            _Block(channels, heads, window, shifted=bool(number % 2)) for number in range(depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        features = self.downsample(features)
        for block in self.blocks:
            features = block(features)
        return features


class _Block(nn.Module):
    def __init__(self, channels: int, heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = _WindowAttention(channels, heads, window)
        self.mlp = _MLP(channels)

    def forward(self, features: Tensor) -> Tensor:
        features = features + self._attended(self.norm1(features))
        after: Tensor = features + self.mlp(self.norm2(features))
        return after

    def _attended(self, features: Tensor) -> Tensor:
        height, width, window = features.shape[1], features.shape[2], self.window
        # A single window has no neighbour to be shifted into.
        shift = window // 2 if self.shifted and min(height, width) > window else 0
        apart = None
        if shift:
            features = features.roll((-shift, -shift), (1, 2))
            apart = _apart(height, width, window, shift, features)
        windows: Tensor = self.attn(_windows(features, window), apart)
        blocks = windows.reshape(-1, height // window, width // window, window, window, windows.shape[-1])
        joined = blocks.transpose(2, 3).reshape(features.shape)
        return joined.roll((shift, shift), (1, 2)) if shift else joined


class _WindowAttention(nn.Module):
    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)  # as in the paper's code
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, windows: Tensor, apart: Tensor | None) -> Tensor:
        """Return attended windows; both are `(batch * number, window ** 2, channels)`."""
        query, key, value = self.qkv(windows).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[_relative_positions(self.window, windows.device)].permute(2, 0, 1)
        if apart is not None:  # windows of an image follow each other
            bias = (bias + apart[:, None]).repeat(len(windows) // len(apart), 1, 1, 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        projected: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected


class _MLP(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        mapped: Tensor = self.fc2(F.gelu(self.fc1(features)))
        return mapped


def _windows(features: Tensor, window: int) -> Tensor:
    batch, height, width, channels = features.shape
    blocks = features.reshape(batch, height // window, window, width // window, window, channels)
    return blocks.transpose(2, 3).reshape(-1, window * window, channels)


def _relative_positions(window: int, device: torch.device) -> Tensor:
    """Return the row of the table of biases for each pair of positions in a window."""
    row, column = torch.meshgrid(*[torch.arange(window, device=device)] * 2, indexing="ij")
    rows = row.flatten()[:, None] - row.flatten() + window - 1
    return rows * (2 * window - 1) + column.flatten()[:, None] - column.flatten() + window - 1


def _apart(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """Return what is added to the logits in each window of a shifted image, whose edges come from both sides."""

    def part(length: int) -> Tensor:
        position = torch.arange(length, device=like.device)
        return (position >= length - window).int() + (position >= length - shift).int()

    region = (3 * part(height)[:, None] + part(width))[None, ..., None]
    regions = _windows(region, window)[..., 0]
    return (regions[:, :, None] != regions[:, None]).to(like.dtype) * _APART
