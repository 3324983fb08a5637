"""APG with the paper's settings, inside Adaptive Guidance, on Stable Diffusion XL.

Preset: norm 15 and momentum -0.5 are the paper's for SDXL (arXiv 2410.02416, which goes up to scale 15); the threshold
0.999 on x0 is the default of hfnoise. Not run here with the full weights (a download of 7 GB); a tiny pipeline of the
family, with random weights, is in the tests.
"""

import torch

from hfnoise import AdaptiveGuidance, GuidedStableDiffusionXLPipeline, ProjectedGuidance

NAME = "stabilityai/stable-diffusion-xl-base-1.0"

pipe = GuidedStableDiffusionXLPipeline.from_pretrained(NAME, dtype=torch.float16, variant="fp16").to("cuda")
pipe.guider = AdaptiveGuidance(threshold=0.999, inner=ProjectedGuidance(norm_threshold=15.0, momentum=-0.5))
pipe("a photograph of an astronaut riding a horse", guidance_scale=15.0).images[0].save("sdxl.png")
print(pipe.guidance_report)
pipe.guidance_report.plot("sdxl_guidance.png", threshold=0.999)
