"""Adaptive Guidance on FLUX.1-dev with a negative prompt.

What Flux calls `guidance_scale` is distilled into the model: it costs one evaluation per step, and there is nothing to
save. A negative prompt with `true_cfg_scale` costs two, and is what the guider is for.

Preset: similarity of x0, threshold 0.999, the default of hfnoise. Not run here with the full weights (a download of
30 GB behind a licence); a tiny pipeline of the family, with random weights, is in the tests.
"""

import torch

from hfnoise import AdaptiveGuidance, GuidedFluxPipeline

pipe = GuidedFluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
pipe.guider = AdaptiveGuidance(threshold=0.999)
image = pipe("an astronaut riding a horse", negative_prompt="blurred, cropped", true_cfg_scale=4.0).images[0]
image.save("flux.png")
print(pipe.guidance_report)
