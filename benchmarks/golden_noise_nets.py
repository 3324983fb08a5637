"""The networks of the golden noise benchmark, trained on the same pairs: what each explains, with how many parameters.

The official shape in miniature: the branch of singular values with attention, the prompt as a scale and a shift for
each channel, and a small convolution in the place of its Swin. A Swin of the size of these latents (8 x 8) has patches
of the size of the picture, and would make the official shape look worse than it is.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from hfnoise.benchmarks.guidance_runs import Subject
from hfnoise.pipelines import NoisePromptNet, NPNet
from hfnoise.pipelines.noise_nets import NoiseNet
from hfnoise.pipelines.noise_pairs import collect_noise_pairs
from hfnoise.trainers.noise_prompt import NoisePromptTrainer
from hfnoise.trainers.noise_prompt_arguments import NoisePromptTrainingArguments
from hfnoise.trainers.noise_prompt_rows import NoisePairRows

OFFICIAL, FIRST_PROMPT, OURS = "NPNet in miniature", "NPNet, first prompt only", "NoisePromptNet"
# Of the training: the official size of a batch, and a rate for networks of this size.
BATCH_SIZE, LEARNING_RATE = 64, 2e-3
# Pairs that are not trained on, for each that is.
HELD_OUT = 0.3
# What NoisePromptNet has of its own, beside the sizes of the model that it serves.
_OURS = {"pooled_dim": 64, "hidden_channels": 32, "num_layers": 3}
_SEED = 0
# Channels of the convolutions in the place of the Swin.
_CONVOLUTION = 32


class MiniatureNPNet(NPNet):
    """NPNet with three convolutions in the place of its Swin, for latents of a few numbers a side.

    Args:
        in_channels, sample_size, num_tokens, encoder_hid_dim (`int`): of the model that it serves.
    """

    def __init__(self, in_channels: int, sample_size: int, num_tokens: int, encoder_hid_dim: int) -> None:
        super().__init__(
            in_channels=in_channels, sample_size=sample_size, num_tokens=num_tokens, encoder_hid_dim=encoder_hid_dim,
            svd_value_dim=256, swin_image_size=32, swin_embed_dim=8, swin_depths=[1, 1], swin_num_heads=[1, 2],
            swin_window_size=4,
        )  # fmt: skip
        self.unet_embedding = nn.Sequential(
            nn.Conv2d(in_channels, _CONVOLUTION, 3, padding=1), nn.SiLU(),
            nn.Conv2d(_CONVOLUTION, _CONVOLUTION, 3, padding=1), nn.SiLU(),
            nn.Conv2d(_CONVOLUTION, in_channels, 3, padding=1),
        )  # fmt: skip


class FirstPromptNPNet(MiniatureNPNet):
    """The same, trained as the official code trains: with the first prompt of a batch for all of it."""

    def predict_delta(self, noise: Tensor, prompt_embeds: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the change of noise."""
        if self.training:
            prompt_embeds = prompt_embeds[:1].expand_as(prompt_embeds)
        return super().predict_delta(noise, prompt_embeds, attention_mask)


def new_nets(subject: Subject) -> dict[str, NoiseNet]:
    """Return networks that change nothing yet, by name.

    Args:
        subject ([`~hfnoise.benchmarks.guidance_runs.Subject`]): whom they serve.
    """
    pipe = subject.pipe
    channels, side = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    width = pipe.text_encoder.config.hidden_size
    made: dict[str, NoiseNet] = {}
    with torch.random.fork_rng(devices=[]):
        for name, kind in ((OFFICIAL, MiniatureNPNet), (FIRST_PROMPT, FirstPromptNPNet)):
            torch.manual_seed(_SEED)
            made[name] = kind(channels, side, pipe.tokenizer.model_max_length, width)
        torch.manual_seed(_SEED)
        made[OURS] = NoisePromptNet(in_channels=channels, encoder_hid_dim=width, map_size=side, **_OURS)
    return made


def trained_nets(subject: Subject, pairs: int, steps: int, sampler_steps: int) -> tuple[dict[str, NoiseNet], Any, str]:
    """Return the networks, trained; what is known of each; and what the pairs hold.

    The pairs are of every prompt of the world in turn, with seeds of their own, all kept: no verifier filters them.

    Args:
        subject ([`~hfnoise.benchmarks.guidance_runs.Subject`]): whom they serve.
        pairs (`int`): to train on; others are held out.
        steps (`int`): of the training.
        sampler_steps (`int`): of the calls that the pairs are made for.
    """
    world = subject.world
    every = [world.prompt(row, template) for row in world.combinations().tolist() for template in world.templates]
    with tempfile.TemporaryDirectory() as folder:
        collected = collect_noise_pairs(
            subject.pipe, every, output_dir=Path(folder) / "pairs", batch_size=256, pairs_per_file=4096,
            noises_per_prompt=-(-round(pairs * (1 + HELD_OUT)) // len(every)), num_inference_steps=sampler_steps,
        )  # fmt: skip
        rows = NoisePairRows.from_pairs(collected, subject.pipe)
        train, held_out = rows.split(HELD_OUT / (1 + HELD_OUT))
        # Once, and not at every epoch of every network.
        parts = [[part[index] for index in range(len(part))] for part in (train, held_out)]
        nets, known = new_nets(subject), {}
        for name, net in nets.items():
            known[name] = _trained(net, parts[0], parts[1], steps, folder)
        return nets, known, str(rows.diagnose())


def _trained(net: Any, train: list[Any], held_out: list[Any], steps: int, folder: str) -> dict[str, float]:
    arguments = NoisePromptTrainingArguments(
        output_dir=f"{folder}/run", max_steps=steps, per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=256, learning_rate=LEARNING_RATE, warmup_steps=steps // 10, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, seed=_SEED, use_cpu=True,
    )  # fmt: skip
    trainer = NoisePromptTrainer(net, arguments, train_dataset=train, eval_dataset=held_out)
    trainer.remove_callback(PrinterCallback)
    seconds = trainer.train().metrics["train_runtime"]
    found = {"r2": trainer.evaluate()["eval_delta_r2"], "parameters": sum(one.numel() for one in net.parameters())}
    net.eval()
    return {**found, "training_seconds": seconds}


def parameters_for_sdxl() -> tuple[int, int]:
    """Return the parameters of NPNet and of NoisePromptNet, both as they are for SDXL by default."""
    with torch.device("meta"):
        counts = [sum(one.numel() for one in kind().parameters()) for kind in (NPNet, NoisePromptNet)]
    return counts[0], counts[1]
