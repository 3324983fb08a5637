"""Golden noise by a trained network: one small forward pass from noise and prompt to better noise."""

from __future__ import annotations

import os
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfnoise.latents.hf_checkpoints import read_json
from hfnoise.latents.hf_noise_net import NET_FOLDER, ModelMixin
from hfnoise.latents.hf_npnet import NPNetModel
from hfnoise.latents.hf_prompt_net import NoisePromptModel
from hfnoise.latents.hf_time_free_unet import text_widths
from hfnoise.pipelines.initial_noise import InitialNoise, StartState
from hfnoise.pipelines.latent_space import LatentSpace
from hfnoise.pipelines.one_more_step import placed
from hfnoise.pipelines.start_context import StartContext
from hfnoise.pipelines.start_report import StartReport
from hfnoise.pipelines.start_text import check_width, denoiser_text_widths, encoded_states, encodes_prompts

_OTHER = "Load one that was made for this model."
__all__ = [
    "ModelMixin",
    "NPNet",
    "NoiseNet",
    "NoisePromptNet",
    "load_noise_net",
]  # diffusers looks for ModelMixin where it finds a model


class NoiseNet(InitialNoise):
    """What makes an initial noise of a network: [`NPNet`] and [`NoisePromptNet`] are both.

    It is given the positive prompt as the pipeline encoded it, runs once per image whatever the number of steps, in
    float32 and without gradient, and has no chance in it: a seed keeps its image. After a call, `report` is the
    [`StartReport`] of it: what it cost, and how far the noise was moved.
    """

    subfolder: ClassVar[str | None] = NET_FOLDER
    report: StartReport | None = None

    def check_pipeline(self, pipeline_class: type) -> None:
        """Raise ValueError if a pipeline never encodes a prompt."""
        if not encodes_prompts(pipeline_class):
            raise ValueError(
                f"{pipeline_class.__name__.removeprefix('Guided')} has no encode_prompt, and {type(self).__name__} "
                "refines noise for a prompt. Use a text-to-image pipeline, or an initial noise that needs no prompt."
            )

    def check_parts(self, pipe: Any) -> None:
        """Raise ValueError if the denoiser of a pipeline reads text states of another width."""
        reads = denoiser_text_widths(pipe)
        own = text_widths(self)
        if reads and own and not reads & own:
            name, widths = type(pipe).__name__.removeprefix("Guided"), " or ".join(map(str, sorted(reads)))
            raise ValueError(
                f"{type(self).__name__} takes text states {min(own)} wide (encoder_hid_dim), and the text states of "
                f"{name} are {widths} wide. {_OTHER}"
            )

    def to_config(self) -> dict[str, Any]:
        """Return the options of the network."""
        options: Any = self.config  # type: ignore[attr-defined]
        return {name: value for name, value in options.items() if not name.startswith("_")}

    def refine(self, unit_noise: Tensor, context: StartContext) -> StartState:
        """Return the refined noise; the very noise at `scale=0`.

        Raises:
            ValueError: if the pipeline encoded no prompt, text states or latents are not those that the network was
                made for, or there is NaN in the latents or in what it puts out.
        """
        net: Any = self
        if net.scale == 0.0:
            self.report = StartReport.of(unit_noise, unit_noise)
            return StartState(unit_noise)
        name = type(self).__name__
        states = encoded_states(
            context, f"{name} needs text states: take a pipeline that encodes its prompt first, or no {name}."
        )
        check_width(net, states, context, reader=name, remedy=_OTHER)
        mask = context.prompt_mask
        if mask is not None:
            mask = context.per_sample(mask[..., None], "the mask of prompt_embeds")[..., 0]
        if not bool(torch.isfinite(unit_noise).all()):
            raise ValueError(f"the latents given to {context.name} hold NaN or infinity.")
        space = LatentSpace.of(context, unit_noise)
        noise = space.unpack(unit_noise)
        _check_images(noise, net, context)
        with torch.no_grad():
            refined = placed(net, noise.device)(noise, states, mask).noise
        if not bool(torch.isfinite(refined).all()):
            raise ValueError(
                f"{name} put out NaN or infinity; its weights are {next(net.parameters()).dtype}. Load them in "
                "float32, or check them."
            )
        self.report = StartReport.of(noise, refined, evaluations=1)
        return StartState(space.pack(refined), evaluations=1)


def _check_images(noise: Tensor, net: Any, context: StartContext) -> None:
    channels = net.config.in_channels
    if noise.dim() != 4 or noise.shape[1] != channels:
        raise ValueError(
            f"{type(net).__name__} refines images of latents of {channels} channels, (batch, {channels}, height, "
            f"width), and {context.name} has latents of shape {tuple(noise.shape)}: it was made for another model."
        )


class NPNet(NPNetModel, NoiseNet):
    """Golden Noise (arXiv 2411.09502): the published network as an initial noise, exact, and the same at every call.

    The published weights (`.pth` or safetensors, for SDXL, DreamShaper-XL and Hunyuan-DiT) are read by
    `from_single_file`; `from_pretrained` reads what `save_pretrained` wrote, or `hfnoise convert npnet`. See
    [`hfnoise.latents.hf_npnet.NPNetModel`] for what it computes, its departures and all options.

    Args:
        scale (`float`, defaults to `1.0`): of the change; 0 is off, the stock run to the bit. It can be set between
            calls.
        kwargs: as in [`hfnoise.latents.hf_npnet.NPNetModel`].

    Raises:
        TypeError: if an option is unknown, or `scale` is no number.
        ValueError: if sizes do not fit each other.

    Example:
        >>> from hfnoise.pipelines import NPNet, guide
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe = new_digits_pipeline(width=8)
        >>> net = NPNet(sample_size=8, num_tokens=8, encoder_hid_dim=64, swin_image_size=32, swin_embed_dim=8,
        ...     swin_depths=[1, 1], swin_num_heads=[1, 2], swin_window_size=4)
        >>> with guide(pipe, initial_noise=net):
        ...     image = pipe("the digit seven", num_inference_steps=2).images[0]
    """


class NoisePromptNet(NoisePromptModel, NoiseNet):
    """Golden noise by a network of our own: smaller, for latents of any size, the identity before it is trained.

    See [`hfnoise.latents.hf_prompt_net.NoisePromptModel`] for what it computes and all options.

    Args:
        scale (`float`, defaults to `1.0`): of the change; 0 is off, the stock run to the bit. It can be set between
            calls.
        kwargs: as in [`hfnoise.latents.hf_prompt_net.NoisePromptModel`].

    Raises:
        ValueError: if sizes do not fit each other.

    Example:
        >>> from hfnoise.pipelines import NoisePromptNet, guide
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe = new_digits_pipeline(width=8)
        >>> net = NoisePromptNet(encoder_hid_dim=64, pooled_dim=64, map_size=8, hidden_channels=32)
        >>> with guide(pipe, initial_noise=net):
        ...     image = pipe("the digit seven", num_inference_steps=2).images[0]
    """


_CLASSES: dict[str, Any] = {"NPNet": NPNet, "NoisePromptNet": NoisePromptNet}


def load_noise_net(name: str | PathLike[str], **kwargs: Any) -> NoiseNet:
    """Return the network of golden noise of a folder, Hub repository or file, of whatever class it is.

    Args:
        name (`str` or `os.PathLike`): of a network, or of a pipeline that has it in `npnet`; or the file of an
            official checkpoint of NPNet.
        kwargs: as in `from_pretrained` of the class; `scale=` replaces the saved one.

    Raises:
        ValueError: if there is none.

    Example:
        >>> from hfnoise.pipelines.noise_nets import NoisePromptNet, load_noise_net
        >>> NoisePromptNet(encoder_hid_dim=64, pooled_dim=64, map_size=8, hidden_channels=32).save_pretrained("net")
        >>> type(load_noise_net("net", scale=0.5)).__name__
        'NoisePromptNet'
    """
    path = os.fspath(name)
    if os.path.isfile(path):
        net: NoiseNet = NPNet.from_single_file(path, **kwargs)
        return net
    config = next(
        (found for file in ("config.json", f"{NET_FOLDER}/config.json") if (found := read_json(path, file, **kwargs))),
        {},
    )
    if config.get("_class_name") not in _CLASSES:
        raise ValueError(
            f"{path} holds no network of golden noise: a folder or repository with the config.json of "
            f"{' or '.join(_CLASSES)}, there or in {NET_FOLDER}/, is needed, or the file of an official checkpoint."
        )
    loaded: NoiseNet = _CLASSES[config["_class_name"]].from_pretrained(path, **kwargs)
    return loaded
