"""The network of Golden Noise, without what is random in the official one."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.normalization import AdaGroupNorm
from torch import Tensor, nn

from hfnoise.latents.hf_noise_net import ModelMixin, NoiseNetModel, checked_scale
from hfnoise.latents.resizing import resized_delta, resized_noise
from hfnoise.latents.singular_values import (
    SIGNS,
    FactorCache,
    NoiseFactors,
    noise_factors,
    tile_shape,
    tiled,
    untiled,
)
from hfnoise.latents.swin import SwinTransformer

__all__ = ["ModelMixin", "NPNetModel"]

LONG_PROMPTS = ("truncate", "mean")


class NPNetModel(NoiseNetModel):
    """Golden Noise's NPNet (arXiv 2411.09502): new singular values, a prompt in eight numbers, a Swin.

    delta = U diag(d) V' + (2 sigmoid(alpha) - 1) e + beta F(x + e), where x = U diag(s) V' is the noise with its
    channels as tiles of one matrix, d comes of an attention over the singular vectors, e is a group norm of x with
    scale and shift from the prompt, and F a Swin. Weights have the names of the official checkpoints.

    Departures from the official code, which is random at inference because its Swin stays in training mode: there is
    no drop path at all. The change is added to the noise, where the official one multiplies the factors out again and
    so adds their rounding. What never has a part (`bn`, a classifier) is left out. Latents of another size than
    `sample_size`, which the official one refuses: the network sees the noise on its own grid
    ([`hfnoise.latents.resized_noise`]) and only the change is resized; the noise is not.

    Args:
        sample_size (`int`, defaults to `128`): side of the latents that it was trained on.
        in_channels (`int`, defaults to `4`): of the latents.
        num_tokens (`int`, defaults to `77`): of a prompt; the official layout needs exactly as many.
        encoder_hid_dim (`int`, defaults to `2048`): width of the text states; 2048 for SDXL, 1024 for Hunyuan-DiT.
        tile_rows (`int`, *optional*): rows of tiles; nearly a square by default, 2 for 4 channels, 4 for 16.
        svd_attention (`bool`, defaults to `True`): attention over the singular vectors; the published training code
            has none.
        svd_num_heads (`int`, defaults to `8`): of it; they share as many channels as there are singular values.
        svd_vector_dim (`int`, defaults to `64`), svd_value_dim (`int`, defaults to `1024`): hidden widths of the
            perceptrons that read singular vectors, and put out d.
        svd_sign (`str`, defaults to `"canonical"`): of singular vectors, the same with every library; `"lapack"` for
            official weights. See [`hfnoise.latents.singular_values.noise_factors`].
        swin_image_size, swin_patch_size, swin_window_size (`int`, default to `224`, `4`, `7`): of the Swin.
        swin_embed_dim (`int`, defaults to `96`), swin_depths, swin_num_heads (list of `int`): those of `swin_tiny`.
        long_prompts (`str`, defaults to `"truncate"`): of more tokens: the first `num_tokens` count; or `"mean"` of
            the changes for each chunk of `num_tokens`.
        scale (`float`, defaults to `1.0`): of the change; 0 is off.
        renormalize (`bool`, defaults to `False`): give each sample the norm of its noise again.

    Raises:
        ValueError: if sizes do not fit each other, or an option is unknown.

    Example:
        >>> import torch
        >>> from hfnoise.latents.hf_npnet import NPNetModel
        >>> net = NPNetModel(sample_size=8, num_tokens=3, encoder_hid_dim=6, swin_image_size=32, swin_embed_dim=8,
        ...     swin_depths=[1, 1], swin_num_heads=[1, 2], swin_window_size=4)
        >>> net(torch.randn(1, 4, 8, 8), torch.randn(1, 3, 6)).noise.shape
        torch.Size([1, 4, 8, 8])
    """

    saved_class: ClassVar[str] = "NPNet"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 128,
        in_channels: int = 4,
        num_tokens: int = 77,
        encoder_hid_dim: int = 2048,
        tile_rows: int | None = None,
        svd_attention: bool = True,
        svd_num_heads: int = 8,
        svd_vector_dim: int = 64,
        svd_value_dim: int = 1024,
        svd_sign: str = "canonical",
        swin_image_size: int = 224,
        swin_patch_size: int = 4,
        swin_window_size: int = 7,
        swin_embed_dim: int = 96,
        swin_depths: Sequence[int] = (2, 2, 6, 2),
        swin_num_heads: Sequence[int] = (3, 6, 12, 24),
        long_prompts: str = "truncate",
        scale: float = 1.0,
        renormalize: bool = False,
    ) -> None:
        super().__init__()
        if svd_sign not in SIGNS:
            raise ValueError(f"svd_sign must be one of {SIGNS}, got {svd_sign!r}.")
        if long_prompts not in LONG_PROMPTS:
            raise ValueError(f"long_prompts must be one of {LONG_PROMPTS}, got {long_prompts!r}.")
        if sample_size < 1:
            raise ValueError(f"sample_size must be at least 1, got {sample_size}.")
        checked_scale(scale)
        self.tiles = tile_shape(in_channels, tile_rows)
        rows, columns = (number * sample_size for number in self.tiles)
        heads = svd_num_heads if svd_attention else 0
        self.unet_svd = _SingularValues(rows, columns, svd_vector_dim, svd_value_dim, heads)
        self.unet_embedding = _SwinResidual(
            in_channels,
            swin_image_size,
            SwinTransformer(
                swin_image_size, swin_patch_size, swin_embed_dim, swin_depths, swin_num_heads, swin_window_size
            ),
            swin_image_size // (swin_patch_size * 2 ** (len(swin_depths) - 1)),
        )
        # One group and this eps: the official ones.
        self.text_embedding = AdaGroupNorm(num_tokens * encoder_hid_dim, in_channels, num_groups=1, eps=1e-6)
        self.alpha, self.beta = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.factor_cache = FactorCache()

    @classmethod
    def from_single_file(cls, checkpoint: str | PathLike[str], **kwargs: Any) -> NPNetModel:
        """Return the network of an official checkpoint, `.pth` or `.safetensors`, in evaluation mode.

        Args:
            checkpoint (`str` or `os.PathLike`): file; or folder or Hub repository with one such file.
            kwargs: of [`hfnoise.latents.hf_npnet_checkpoints.load_npnet_checkpoint`]: `filename`, `num_tokens`,
                `svd_attention`, `revision`, `token`, ...; and options of this class that weights do not tell, such as
                `scale`.

        Raises:
            ValueError: if it is no checkpoint of NPNet.
        """
        from hfnoise.latents.hf_npnet_checkpoints import load_npnet_checkpoint

        return load_npnet_checkpoint(checkpoint, model_class=cls, **kwargs)  # type: ignore[no-any-return]

    def forward(self, noise: Tensor, prompt_embeds: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Return the refined noise and the change; see [`NoiseNetModel.forward`].

        `attention_mask` has no part: the official layout reads the states of the padding as they are.

        Raises:
            ValueError: if a shape is not that of this network, there are too few tokens, or the noise holds NaN.
        """
        return super().forward(noise, prompt_embeds, attention_mask)

    def predict_delta(self, noise: Tensor, prompt_embeds: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the change of noise, on its own grid."""
        height, width = noise.shape[-2:]
        side = self.config.sample_size
        if (height, width) != (side, side):
            noise = resized_noise(noise, side, side)
        delta = untiled(self.unet_svd(self._factors(noise)), *self.tiles)
        chunks = self._chunks(prompt_embeds)
        for states in chunks:
            embedding = self.text_embedding(noise, states.flatten(1))
            residual = self.unet_embedding(noise + embedding)
            delta = delta + ((2 * self.alpha.sigmoid() - 1) * embedding + self.beta * residual) / len(chunks)
        return resized_delta(delta, height, width)

    def _factors(self, noise: Tensor) -> NoiseFactors:
        matrix = tiled(noise, self.tiles[0])
        if self.training:
            return self.factor_cache(matrix, self._factorize)
        return self._factorize(matrix)

    def _factorize(self, matrix: Tensor) -> NoiseFactors:
        return noise_factors(matrix, self.config.svd_sign)

    def _chunks(self, states: Tensor) -> list[Tensor]:
        size, given = self.config.num_tokens, states.shape[1]
        mean = self.config.long_prompts == "mean"
        if given < size or (mean and given % size):
            wanted = f"a multiple of {size}" if mean else f"at least {size}"
            raise ValueError(
                f"NPNet takes {wanted} tokens, got {given}: its weights belong to positions. Pad the prompt to "
                f"{size} (padding='max_length'), or take a NoisePromptNet, which has no such number."
            )
        return list(torch.split(states, size, dim=1)) if mean else [states[:, :size]]


class _SingularValues(nn.Module):
    """Returns U diag(d) V', the change of the matrix that new singular values make."""

    def __init__(self, rows: int, columns: int, vector_dim: int, value_dim: int, heads: int) -> None:
        super().__init__()
        number = min(rows, columns)
        self.mlp1 = _perceptron(rows, vector_dim, number)
        self.mlp2 = _perceptron(columns, vector_dim, number)
        self.mlp3 = nn.Sequential(nn.Linear(number, number))
        self.attention = _Attention(number, heads) if heads else nn.Identity()
        self.mlp4 = _perceptron(number, value_dim, number)

    def forward(self, factors: NoiseFactors) -> Tensor:
        u, s, vh = factors
        tokens = self.mlp1(u.mT) + self.mlp2(vh) + self.mlp3(s)[:, None]
        change: Tensor = self.mlp4(self.attention(tokens).mean(1))
        return (u * change[:, None]) @ vh


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class _Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"svd_num_heads must divide the {channels} singular values, got {heads}.")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected


class _SwinResidual(nn.Module):
    """Returns Swin features on the grid of the latents, in which the rows of the features serve as channels.

    An accident of the official code, which takes features with the channels last for features with the channels
    first; the weights depend on it. The resizes take the nearest pixel, as there.
    """

    def __init__(self, channels: int, image_size: int, swin: SwinTransformer, feature_rows: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.downconv = nn.Conv2d(channels, 3, 1)
        self.swin = swin
        self.upconv = nn.Conv2d(feature_rows, channels, 1)

    def forward(self, latents: Tensor) -> Tensor:
        images = self.downconv(F.interpolate(latents, self.image_size))
        residual: Tensor = self.upconv(F.interpolate(self.swin(images), latents.shape[-2:]))
        return residual
