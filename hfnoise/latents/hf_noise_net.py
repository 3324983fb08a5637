"""Base of the networks that turn noise into better noise for a prompt."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from hfnoise.guidance.number_check import check_number
from hfnoise.hf_sharing import ExplainedPush
from hfnoise.latents.hf_checkpoints import read_json

__all__ = ["ModelMixin", "NoiseNetModel", "RefinedNoise"]  # diffusers looks for ModelMixin where it finds a model


# Where a repository of a pipeline keeps such a network.
NET_FOLDER = "npnet"


@dataclass
class RefinedNoise(BaseOutput):  # type: ignore[misc]
    """What a network makes of noise, in float32.

    Args:
        noise (`torch.Tensor` of shape `(batch, channels, height, width)`): to start from, of unit variance.
        delta (`torch.Tensor` of the same shape): the change for `scale=1`; what training compares with its target.
    """

    # Defaults, since accelerate makes it anew of a dictionary, in mixed precision.
    noise: Tensor = None  # type: ignore[assignment]
    delta: Tensor = None  # type: ignore[assignment]


class NoiseNetModel(ExplainedPush, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Base of [`NPNetModel`] and [`NoisePromptModel`]: checks, float32 inside, scale and size of the change.

    A network of it has `in_channels`, `encoder_hid_dim`, `scale` and `renormalize` in its config, and a
    `predict_delta` without chance in it: the same noise and prompt give the same result, in training too.
    """

    # The public class of this network, which reads what any class of it has saved.
    saved_class: ClassVar[str]

    @abstractmethod
    def predict_delta(self, noise: Tensor, prompt_embeds: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the change of noise, of its shape; all is in float32, and checked."""

    @property
    def scale(self) -> float:
        """Of the change; 0 leaves the noise as it is. It is saved with the weights."""
        return float(self.config.scale)

    @scale.setter
    def scale(self, scale: float) -> None:
        self.register_to_config(scale=checked_scale(scale))

    def forward(self, noise: Tensor, prompt_embeds: Tensor, attention_mask: Tensor | None = None) -> RefinedNoise:
        """Return the refined noise and the change, in float32 whatever the dtype of what is given and of the weights.

        Args:
            noise (`torch.Tensor` of shape `(batch, in_channels, height, width)`): of unit variance.
            prompt_embeds (`torch.Tensor` of shape `(batch, tokens, encoder_hid_dim)`): states of the positive prompt.
            attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 0 where a state is of padding.

        Raises:
            ValueError: if a shape is not that of this network; the message names both.
        """
        self._check(noise, prompt_embeds, attention_mask)
        halves = {name: p for name, p in self.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)}
        if halves:
            whole = {name: parameter.float() for name, parameter in halves.items()}
            same: RefinedNoise = torch.func.functional_call(self, whole, (noise, prompt_embeds, attention_mask))
            return same
        with torch.autocast(noise.device.type, enabled=False):
            noise = noise.float()
            delta = self.predict_delta(noise, prompt_embeds.float(), attention_mask)
            refined = noise + self.scale * delta
            if self.config.renormalize:
                before, after = (torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True) for x in (noise, refined))
                refined = refined * (before / after)
        return RefinedNoise(refined, delta)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Return the network that `save_pretrained` wrote, in evaluation mode.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub repository of a network, or of a
                pipeline that has it in `npnet`.
            subfolder (`str`, *optional*): where it is; found by default.
            kwargs: as in `diffusers.ModelMixin.from_pretrained`; and options that replace saved ones, such as `scale`.

        Raises:
            ValueError: if there is no network, or one of another class.
        """
        path = os.fspath(pretrained_model_name_or_path)
        name = cls.saved_class
        if os.path.isfile(path):
            raise ValueError(f"{path} is a file. An official checkpoint of NPNet is read by NPNet.from_single_file.")
        if subfolder is None:
            subfolder = "" if read_json(path, "config.json", **kwargs) is not None else NET_FOLDER
        config = read_json(path, f"{subfolder}/config.json".lstrip("/"), **kwargs)
        if config is None or "_class_name" not in config:
            wanted = f"{subfolder}/config.json".lstrip("/")
            raise ValueError(
                f"{path} holds no {name}: there is no {wanted} of one. Give the folder that save_pretrained wrote; an "
                "official checkpoint of NPNet is read by NPNet.from_single_file."
            )
        if config["_class_name"] != name:
            raise ValueError(
                f"{os.path.join(path, subfolder)} holds a {config['_class_name']}, and no {name}. Load it with "
                "from_pretrained of that class."
            )
        if "torch_dtype" in kwargs:  # of which diffusers warns
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        # diffusers asks for None where there is no sub-folder.
        return super().from_pretrained(path, subfolder=subfolder or None, **kwargs)

    def _check(self, noise: Tensor, states: Tensor, mask: Tensor | None) -> None:
        name, channels, width = self.saved_class, self.config.in_channels, self.config.encoder_hid_dim
        if noise.dim() != 4 or noise.shape[1] != channels:
            raise ValueError(
                f"{name} takes noise of shape (batch, {channels}, height, width), got {tuple(noise.shape)}: it was "
                "made for other latents. Take one that was made for this model."
            )
        if states.dim() != 3 or states.shape[-1] != width or len(states) != len(noise):
            raise ValueError(
                f"{name} takes text states of shape ({len(noise)}, tokens, {width}), got {tuple(states.shape)}. The "
                "width is that of the text encoders it was trained with; take one that was made for this model."
            )
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(
                f"attention_mask must have a number a text state, {tuple(states.shape[:2])}, got {tuple(mask.shape)}."
            )

    def to_json_string(self) -> str:
        """Return the config as diffusers writes it, under the name of the public class."""
        config: dict[str, Any] = json.loads(super().to_json_string())
        config["_class_name"] = self.saved_class
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def checked_scale(scale: float) -> float:
    """Return the scale of a change.

    Raises:
        TypeError: if it is no number.
        ValueError: unless it is finite and at least 0.

    Example:
        >>> from hfnoise.latents.hf_noise_net import checked_scale
        >>> checked_scale(0.5)
        0.5
    """
    check_number("scale", scale)
    if not 0.0 <= scale < float("inf"):
        raise ValueError(f"scale must be at least 0, where 0 is off; got {scale}.")
    return scale
