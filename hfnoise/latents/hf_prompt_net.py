"""A smaller network for golden noise, for any size of latents."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hfnoise.latents.hf_noise_net import ModelMixin, NoiseNetModel, checked_scale
from hfnoise.latents.resizing import resized_delta

__all__ = ["ModelMixin", "NoisePromptModel"]


class NoisePromptModel(NoiseNetModel):
    """Adds to the noise a map that belongs to the prompt, and what a few convolutions see in the noise.

    delta = B(c) + F(x, c), ours, after what golden noise is: the change is nearly a function of the prompt alone,
    since at the first step the model sees noise only. c pools the text states by learnt attention; B is a small map,
    interpolated to the size of the latents; F are convolutions whose channels c scales and shifts (FiLM). There is no
    singular value decomposition, which can express 1 / (2 side) of the energy of a change that does not depend on the
    noise. Any size of latents, any number of tokens and channels; exactly the identity before training.

    Args:
        in_channels (`int`, defaults to `4`): of the latents, unpacked.
        encoder_hid_dim (`int`, defaults to `2048`): width of the text states.
        pooled_dim (`int`, defaults to `256`): of c.
        pooling_heads (`int`, defaults to `8`): attentions over the tokens, which share the pooled_dim.
        map_size (`int`, defaults to `32`): side of the map of B: a quarter of SDXL's 128, since the change is smooth.
        hidden_channels (`int`, defaults to `64`), num_layers (`int`, defaults to `3`): of F; 0 layers leave it out.
        norm_num_groups (`int`, defaults to `8`): of its channels.
        scale (`float`, defaults to `1.0`): of the change; 0 is off.
        renormalize (`bool`, defaults to `False`): give each sample the norm of its noise again.

    Raises:
        ValueError: if sizes do not fit each other.

    Example:
        >>> import torch
        >>> from hfnoise.latents.hf_prompt_net import NoisePromptModel
        >>> net = NoisePromptModel(encoder_hid_dim=6, pooled_dim=8, map_size=4, hidden_channels=8)
        >>> noise = torch.randn(2, 4, 8, 12)
        >>> torch.equal(net(noise, torch.randn(2, 5, 6)).noise, noise)
        True
    """

    saved_class: ClassVar[str] = "NoisePromptNet"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 4,
        encoder_hid_dim: int = 2048,
        pooled_dim: int = 256,
        pooling_heads: int = 8,
        map_size: int = 32,
        hidden_channels: int = 64,
        num_layers: int = 3,
        norm_num_groups: int = 8,
        scale: float = 1.0,
        renormalize: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "map_size": map_size, "pooling_heads": pooling_heads}
        for name, size in {**sizes, "norm_num_groups": norm_num_groups}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if num_layers < 0:
            raise ValueError(f"num_layers must be at least 0, where 0 leaves the convolutions out; got {num_layers}.")
        if pooled_dim % pooling_heads or hidden_channels % norm_num_groups:
            raise ValueError(
                f"pooling_heads ({pooling_heads}) must divide pooled_dim ({pooled_dim}), and norm_num_groups "
                f"({norm_num_groups}) hidden_channels ({hidden_channels})."
            )
        checked_scale(scale)
        self.pooler = _TextPooler(encoder_hid_dim, pooled_dim, pooling_heads)
        self.map = nn.Linear(pooled_dim, in_channels * map_size**2)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)
        self.residual = (
            _ConvolutionalResidual(in_channels, hidden_channels, num_layers, pooled_dim, norm_num_groups)
            if num_layers
            else None
        )

    def predict_delta(self, noise: Tensor, prompt_embeds: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the change of noise."""
        pooled = self.pooler(prompt_embeds, attention_mask)
        small = self.map(pooled).reshape(len(noise), self.config.in_channels, *[self.config.map_size] * 2)
        delta = resized_delta(small, *noise.shape[-2:])
        return delta if self.residual is None else delta + self.residual(noise, pooled)


class _TextPooler(nn.Module):
    """Pools text states to one vector; a row whose mask is 0 everywhere counts all its tokens alike."""

    def __init__(self, width: int, pooled_dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, heads)
        self.value = nn.Linear(width, pooled_dim)
        self.hidden = nn.Linear(pooled_dim, pooled_dim)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        states = self.norm(states)
        logits = self.attention(states)
        if mask is not None:
            logits = logits.masked_fill(mask[..., None] == 0, torch.finfo(logits.dtype).min)
        values = self.value(states).unflatten(2, (logits.shape[2], -1))
        pooled = (logits.softmax(1)[..., None] * values).sum(1).flatten(1)
        return F.silu(pooled + self.hidden(F.silu(pooled)))


class _ConvolutionalResidual(nn.Module):
    def __init__(self, in_channels: int, channels: int, num_layers: int, pooled_dim: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(_FiLMBlock(channels, pooled_dim, groups) for _ in range(num_layers))
        self.last = nn.Conv2d(channels, in_channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, noise: Tensor, pooled: Tensor) -> Tensor:
        hidden = self.first(noise)
        for block in self.blocks:
            hidden = block(hidden, pooled)
        change: Tensor = self.last(F.silu(hidden))
        return change


class _FiLMBlock(nn.Module):
    def __init__(self, channels: int, pooled_dim: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, affine=False)
        self.film = nn.Linear(pooled_dim, 2 * channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor, pooled: Tensor) -> Tensor:
        scale, shift = self.film(pooled)[:, :, None, None].chunk(2, 1)
        change: Tensor = self.conv(F.silu(self.norm(hidden) * (1 + scale) + shift))
        return hidden + change
