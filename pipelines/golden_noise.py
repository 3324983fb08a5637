"""Any pipeline with golden noise in one line."""

from __future__ import annotations

from os import PathLike
from typing import Any

from hfnoise.latents.hf_noise_net import NET_FOLDER
from hfnoise.pipelines.initial_noise import InitialNoise
from hfnoise.pipelines.noise_chain import members_of
from hfnoise.pipelines.noise_nets import NoiseNet, load_noise_net
from hfnoise.pipelines.noise_preset import InitialNoisePreset


class GoldenNoisePipeline(InitialNoisePreset):
    """[`AutoGuidedPipeline`] that starts from better noise: of a network, of the model itself, or of a search.

    Golden noise (arXiv 2411.09502). The initial noise is the one given, [`NoisePromptNet`], [`NPNet`], [`ReDenoise`],
    [`NoiseLevelGuidance`], [`RandomSearch`] or another that makes unit noise, alone or in a list with others, or else
    the saved one. What is returned is the guided class of the model, with a guider if one is given or saved.
    `from_pretrained` and `from_pipe` take `npnet=`, a network, its folder or repository, or an official checkpoint
    file, too: it is short for `initial_noise=net`.

    Example:
        >>> from hfnoise.pipelines import GoldenNoisePipeline, NoisePromptNet
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> net = NoisePromptNet(encoder_hid_dim=64, pooled_dim=64, map_size=8, hidden_channels=32)
        >>> pipe = GoldenNoisePipeline.from_pipe(new_digits_pipeline(width=8), npnet=net)
        >>> pipe.save_pretrained("digits")
        >>> type(GoldenNoisePipeline.from_pretrained("digits").initial_noise).__name__
        'NoisePromptNet'
    """

    network = "npnet"
    folder = NET_FOLDER

    @classmethod
    def _of_network(cls, network: Any, options: dict[str, Any], changed: dict[str, Any]) -> InitialNoise:
        if isinstance(network, (str, PathLike)):
            return load_noise_net(network, **options)
        if not isinstance(network, NoiseNet):
            raise TypeError(
                f"npnet is a {type(network).__name__}; give hfnoise.NoisePromptNet(...), hfnoise.NPNet(...), or the "
                "folder or repository of one."
            )
        return network

    @classmethod
    def _check_kind(cls, noise: InitialNoise) -> None:
        members = members_of(noise)
        if not any(member.space == "unit" for member in members):
            raise TypeError(
                "GoldenNoisePipeline takes an initial noise that makes unit noise, alone or in a list with others, "
                f"got {' and '.join(type(member).__name__ for member in members)}. AutoGuidedPipeline takes any."
            )
