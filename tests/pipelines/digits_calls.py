"""Calls of the untrained digits pipeline, with and without a guider."""

from __future__ import annotations

import torch

from hfnoise.pipelines import AdaptiveGuidance, guide

PROMPTS = ["the digit seven", "the digit two"]


def new_pipe():
    """Return the pipeline with weights large enough that prompts matter."""
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline
    from hfnoise.worlds.tiny_pipelines.family import spread_out

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = new_digits_pipeline(width=8)
        spread_out(made.unet)
    return made


def run(pipe, prompt=PROMPTS, **arguments):
    count = len(prompt) if isinstance(prompt, list) else 1
    generator = [torch.Generator().manual_seed(i) for i in range(count * arguments.get("num_images_per_prompt", 1))]
    arguments = {"num_inference_steps": 4, "output_type": "latent", "generator": generator, **arguments}
    return pipe(prompt, **arguments).images


def guided(pipe, guider, prompt=PROMPTS, **arguments):
    with guide(pipe, guider):
        return run(pipe, prompt, **arguments)


def never(**options):
    return AdaptiveGuidance(threshold=1.0, min_steps=1.0, space="model", **options)
