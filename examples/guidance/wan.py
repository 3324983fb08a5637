"""Adaptive Guidance on Wan 2.1, text to video; for Wan 2.2 with its two models the lines are the same.

Preset: similarity of x0, threshold 0.999, the default of hfnoise. Not run here with the full weights (a download of
27 GB); tiny pipelines of both families, with random weights, are in the tests.
"""

import torch
from diffusers.utils import export_to_video

from hfnoise import AdaptiveGuidance, GuidedWanPipeline

pipe = GuidedWanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", dtype=torch.bfloat16).to("cuda")
pipe.guider = AdaptiveGuidance(threshold=0.999)
video = pipe("a cat walks on the grass", height=480, width=832, num_frames=81, guidance_scale=5.0).frames[0]
export_to_video(video, "wan.mp4", fps=15)
print(pipe.guidance_report)
