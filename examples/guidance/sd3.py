"""Adaptive Guidance on Stable Diffusion 3.5, with the pipeline that you have; after the block it is as it was.

Preset: similarity of x0, threshold 0.999, the default of hfnoise. Not run here with the full weights (a download
behind a licence); a tiny pipeline of the family, with random weights, is in the tests.
"""

import torch
from diffusers import StableDiffusion3Pipeline

import hfnoise

NAME = "stabilityai/stable-diffusion-3.5-medium"

pipe = StableDiffusion3Pipeline.from_pretrained(NAME, dtype=torch.bfloat16).to("cuda")
with hfnoise.guide(pipe, hfnoise.AdaptiveGuidance(threshold=0.999)):
    pipe("a photograph of an astronaut riding a horse", guidance_scale=4.5).images[0].save("sd3.png")
    print(pipe.guidance_report)
