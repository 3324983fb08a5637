"""Tiny pairs of noise and golden noise, and a trainer of a network on them."""

import datasets
import torch

from hfnoise.latents.hf_prompt_net import NoisePromptModel
from hfnoise.trainers.noise_prompt import NoisePromptTrainer
from hfnoise.trainers.noise_prompt_arguments import NoisePromptTrainingArguments
from hfnoise.trainers.noise_prompt_rows import NoisePairRows
from tests.trainers.diffusion_world import arguments

SHAPE, WIDTH, PROMPTS = (4, 8, 8), 6, ("zero", "one", "two")


def make_pairs(count=24, scored=True):
    """Return pairs whose change is a smooth map of the prompt minus a share of the noise, and margins from -1 to 1."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(len(PROMPTS), 4, 1, 1, generator=generator).expand(-1, *SHAPE)
    seeds = list(range(100, 100 + count))
    noise = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    delta = 0.3 * maps[torch.arange(count) % len(PROMPTS)] - 0.1 * noise
    scores = {"score_noise": [0.0] * count, "score_golden": torch.linspace(-1, 1, count).tolist()}
    return datasets.Dataset.from_dict(
        {"prompt": [PROMPTS[row % len(PROMPTS)] for row in range(count)], "seed": seeds, "delta": delta.tolist()}
        | (scores if scored else {})
    )


def make_states():
    """Return text states by prompt."""
    states = torch.randn(len(PROMPTS), 5, WIDTH, generator=torch.Generator().manual_seed(1))
    return {prompt: {"prompt_embeds": state} for prompt, state in zip(PROMPTS, states, strict=True)}


def make_rows(count=24, scored=True):
    """Return rows of such pairs."""
    return NoisePairRows(make_pairs(count, scored), make_states())


def new_net(seed=0):
    """Return a network that changes nothing yet."""
    torch.manual_seed(seed)
    return NoisePromptModel(
        encoder_hid_dim=WIDTH, pooled_dim=8, pooling_heads=2, map_size=4, hidden_channels=8, num_layers=1,
        norm_num_groups=4,
    )  # fmt: skip


def new_trainer(folder, net=None, rows=None, eval_rows=None, reward=None, **settings):
    """Return a trainer; `settings` are arguments."""
    stock = arguments(folder)
    names = (
        "output_dir", "use_cpu", "bf16", "report_to", "max_steps", "per_device_train_batch_size",
        "per_device_eval_batch_size", "logging_steps", "save_strategy", "disable_tqdm", "seed",
    )  # fmt: skip
    args = NoisePromptTrainingArguments(**{name: getattr(stock, name) for name in names} | settings)
    return NoisePromptTrainer(
        net or new_net(), args, train_dataset=make_rows() if rows is None else rows, eval_dataset=eval_rows,
        reward=reward,
    )  # fmt: skip
