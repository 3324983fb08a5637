"""The network of One More Step: a UNet of diffusers without time."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from hfnoise.hf_sharing import ExplainedPush
from hfnoise.latents.residuals import ResidualStatistics

__all__ = ["ModelMixin", "TimeFreeUNet2DConditionModel"]  # diffusers looks for ModelMixin where it finds a model

# What the embedding of the time is made of, or added to; none of it exists without time.
_TIME_OPTIONS = (
    "flip_sin_to_cos", "freq_shift", "resnet_time_scale_shift", "resnet_skip_time_act", "time_embedding_type",
    "time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "class_embed_type",
    "num_class_embeds", "projection_class_embeddings_input_dim", "class_embeddings_concat", "addition_embed_type",
    "addition_time_embed_dim", "addition_embed_type_num_heads",
)  # fmt: skip
# Those that other weights would follow from.
_REFUSED = ("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim")


class _NoTime(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        return None


class TimeFreeUNet2DConditionModel(ExplainedPush, UNet2DConditionModel):  # type: ignore[misc]
    """Puts out v = -x0 for noise and a prompt; a UNet2DConditionModel without the time and what belongs to it.

    The weights have the names of One More Step's `UNet2DConditionWoCTModel` (arXiv 2311.15744), so that its released
    checkpoints load; those of SingDiffusion (arXiv 2403.08381) load too. It trains, checkpoints activations, takes
    LoRA and attention processors, is saved and pushed as any model of diffusers.

    Args:
        kwargs: of `UNet2DConditionModel`; those about time are taken and have no part.
        residuals (`dict`, *optional*): [`hfnoise.latents.ResidualStatistics`] as a dictionary, for the terminal prior.

    Raises:
        ValueError: for class labels, additional embeddings (SDXL's sizes) and scale-shift norms, which act through
            the time.

    Example:
        >>> import torch
        >>> from hfnoise.latents.hf_time_free_unet import TimeFreeUNet2DConditionModel
        >>> unet = TimeFreeUNet2DConditionModel(
        ...     block_out_channels=(8,), down_block_types=["CrossAttnDownBlock2D"], norm_num_groups=4,
        ...     up_block_types=["CrossAttnUpBlock2D"], layers_per_block=1, cross_attention_dim=6, attention_head_dim=4)
        >>> unet(torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 6)).sample.shape
        torch.Size([1, 4, 8, 8])
    """

    # The stock form, and SingDiffusion's, in which the embedding is there and leads nowhere.
    _keys_to_ignore_on_load_unexpected = [r"time_embedding\.", r"\.time_emb_proj\."]

    def __init__(self, *args: Any, residuals: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        given = inspect.signature(UNet2DConditionModel.__init__).bind(self, *args, **kwargs).arguments
        refused = [name for name in _REFUSED if given.get(name) is not None]
        if given.get("resnet_time_scale_shift", "default") not in (None, "default"):
            refused.append("resnet_time_scale_shift")
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: a UNet without time has no place for it. Leave it out, or use a stock "
                "UNet2DConditionModel as the module, whose timestep is fixed to 0."
            )
        super().__init__(*args, **{name: value for name, value in kwargs.items() if name not in _TIME_OPTIONS})
        self.time_proj, self.time_embedding, self.time_embed_act = _NoTime(), _NoTime(), None
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                module.time_emb_proj = None
        # The parent's forward asks for this one.
        kept = {"addition_embed_type"}
        config = {name: value for name, value in self.config.items() if name in kept or name not in _TIME_OPTIONS}
        statistics = None if residuals is None else ResidualStatistics.from_config(residuals)
        config["residuals"] = None if statistics is None else statistics.to_config()
        self._internal_dict = FrozenDict(config)

    def get_time_embed(self, sample: Tensor, timestep: Any) -> None:
        """Return nothing: there is no time."""

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what a UNet2DConditionModel returns, whose arguments these are, but for the timestep.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): noise of unit variance.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, tokens, cross_attention_dim)`): of the prompt.
        """
        return super().forward(sample, 0, encoder_hidden_states, *args, **kwargs)


def _signature() -> inspect.Signature:
    stock = inspect.signature(UNet2DConditionModel.__init__)
    option = inspect.Parameter("residuals", inspect.Parameter.KEYWORD_ONLY, default=None)
    return stock.replace(parameters=[*stock.parameters.values(), option])


# diffusers reads there which options a class has.
TimeFreeUNet2DConditionModel.__init__.__signature__ = _signature()  # type: ignore[attr-defined]


def module_output(module: nn.Module, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    """Return what a module of One More Step puts out, time-free or stock with its timestep fixed to 0.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DConditionModel
        >>> from hfnoise.latents.hf_time_free_unet import module_output
        >>> unet = UNet2DConditionModel(
        ...     block_out_channels=(8,), down_block_types=["CrossAttnDownBlock2D"], norm_num_groups=4,
        ...     up_block_types=["CrossAttnUpBlock2D"], layers_per_block=1, cross_attention_dim=6, attention_head_dim=4)
        >>> module_output(unet, torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 6)).shape
        torch.Size([1, 4, 8, 8])
    """
    core: Any = getattr(module, "_orig_mod", module)  # of torch.compile
    core = core.get_base_model() if hasattr(core, "get_base_model") else core  # of PEFT
    stock = isinstance(core, UNet2DConditionModel) and not isinstance(core, TimeFreeUNet2DConditionModel)
    output: Tensor
    if stock:
        timestep = torch.zeros((), dtype=torch.long, device=sample.device)
        output = module(sample, timestep, encoder_hidden_states, return_dict=False)[0]
    else:
        output = module(sample, encoder_hidden_states, return_dict=False)[0]
    return output


def text_widths(module: Any) -> frozenset[int]:
    """Return how wide the text states may be that a UNet reads; empty if its config does not say.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> from hfnoise.latents.hf_time_free_unet import text_widths
        >>> unet = UNet2DConditionModel(
        ...     block_out_channels=(8,), down_block_types=["CrossAttnDownBlock2D"], norm_num_groups=4,
        ...     up_block_types=["CrossAttnUpBlock2D"], layers_per_block=1, cross_attention_dim=6, attention_head_dim=4)
        >>> sorted(text_widths(unet))
        [6]
    """
    config = getattr(module, "config", None)
    width = getattr(config, "encoder_hid_dim", None) or getattr(config, "cross_attention_dim", None)
    if width is None:
        return frozenset()
    return frozenset(width if isinstance(width, (list, tuple)) else [width])


# In a stock module's config the name begins with an underscore: diffusers keeps such entries without a warning.
_STOCK_ENTRY = "_residuals"


def module_residuals(module: Any) -> ResidualStatistics | None:
    """Return the residual statistics that a module carries in its config; `None` if it has none.

    Raises:
        ValueError: if they are damaged.
    """
    config = getattr(module, "config", None)
    entry = None if config is None else (config.get("residuals") or config.get(_STOCK_ENTRY))
    return None if entry is None else _statistics(json.dumps(entry))


@functools.lru_cache(maxsize=16)
def _statistics(entry: str) -> ResidualStatistics:
    # The same object for the same numbers: it keeps the roots of its covariances from call to call.
    return ResidualStatistics.from_config(json.loads(entry))


def set_module_residuals(module: Any, statistics: ResidualStatistics | None) -> None:
    """Put residual statistics into the config of a module, with which it is saved and shared.

    Example:
        >>> from hfnoise.latents import ResidualStatistics
        >>> from hfnoise.latents.hf_time_free_unet import (
        ...     TimeFreeUNet2DConditionModel, module_residuals, set_module_residuals)
        >>> unet = TimeFreeUNet2DConditionModel(
        ...     block_out_channels=(8,), down_block_types=["CrossAttnDownBlock2D"], norm_num_groups=4,
        ...     up_block_types=["CrossAttnUpBlock2D"], layers_per_block=1, cross_attention_dim=6, attention_head_dim=4)
        >>> set_module_residuals(unet, ResidualStatistics([0.0], [[0.04]]))
        >>> module_residuals(unet).covariance
        ((0.04,),)
    """
    name = "residuals" if isinstance(module, TimeFreeUNet2DConditionModel) else _STOCK_ENTRY
    module.register_to_config(**{name: None if statistics is None else statistics.to_config()})
