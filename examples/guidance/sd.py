"""Adaptive Guidance on Stable Diffusion 1.5.

Preset: similarity of x0, threshold 0.999, the default of hfnoise. Not run here with the full weights (a download of
4 GB); a tiny pipeline of the family, with random weights, is in the tests.
"""

import torch

from hfnoise import AdaptiveGuidance, GuidedStableDiffusionPipeline

NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"

pipe = GuidedStableDiffusionPipeline.from_pretrained(NAME, dtype=torch.float16).to("cuda")
pipe.guider = AdaptiveGuidance(threshold=0.999)
images = pipe(["a photograph of an astronaut riding a horse", "a bowl of ramen"], guidance_scale=7.5).images
images[0].save("sd.png")
print(pipe.guidance_report)
