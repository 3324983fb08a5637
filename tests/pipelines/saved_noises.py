"""Pipelines with something in the slot `initial_noise`, and what they make."""

from __future__ import annotations

import numpy
import torch

import hfnoise
from hfnoise.latents import ResidualStatistics
from hfnoise.latents.hf_time_free_unet import TimeFreeUNet2DConditionModel, set_module_residuals
from hfnoise.pipelines import BrightnessOffset, InitialNoise, OneMoreStep, StartState, TerminalPrior
from hfnoise.worlds.digits_pipeline import new_digits_pipeline

STATISTICS = ResidualStatistics([0.1, 0.0, 0.0, 1 / 3], (0.04 * torch.eye(4)).tolist())
DIRECTION = (0.5, -1.0, 2.0, 1 / 3)
LISTED = "initial_noise/initial_noise_config.json"


def images(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 2, "output_type": "latent", "generator": generator, **options}
    return pipe("the digit seven", **call).images


def step(**options):
    module = TimeFreeUNet2DConditionModel.from_config(new_digits_pipeline(width=8).unet.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(module.conv_out.weight)
    set_module_residuals(module, STATISTICS)
    return OneMoreStep(module.eval(), **options)


def own_text(encoder_class=None):
    parts = new_digits_pipeline(width=8, seed=1)
    encoder = parts.text_encoder if encoder_class is None else encoder_class(parts.text_encoder.config).eval()
    return {"text_encoder": encoder, "tokenizer": parts.tokenizer}


def everything():
    """Return a member of every class."""
    one = step(eta=numpy.float32(0.25), guidance_scale=1.5, negative_prompt="the digit two", **own_text())
    return [one, TerminalPrior(STATISTICS, scale=0.5), BrightnessOffset(0.3), BrightnessOffset(-0.1, DIRECTION)]


class Mirrored(InitialNoise):
    def refine(self, unit_noise, context):
        return StartState(unit_noise.flip(-1))


def guided(initial_noise=None):
    return hfnoise.AutoGuidedPipeline.from_pipe(new_digits_pipeline(width=8), initial_noise=initial_noise)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
