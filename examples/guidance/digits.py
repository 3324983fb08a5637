"""CFG, Adaptive Guidance and APG side by side on the digits world: one picture, and evaluations printed. Offline.

    python examples/guidance/digits.py

A row of the picture is a guider at a scale, a column is one prompt and one noise.
"""

import torch
from diffusers.utils import make_image_grid

import hfnoise
from hfnoise.worlds.digits_checkpoints import load_digits_pipeline

WORDS = "zero one two three four five six seven eight nine".split()
SCALES = (3.0, 7.5, 15.0)
STEPS = 20


def guiders():
    """Return the rows of the picture."""
    return {
        "CFG": None,
        "Adaptive Guidance": hfnoise.AdaptiveGuidance(threshold=0.99),
        "APG": hfnoise.ProjectedGuidance(norm_threshold="auto", momentum=-0.5),
        "both": hfnoise.AdaptiveGuidance(
            threshold=0.99, inner=hfnoise.ProjectedGuidance(norm_threshold="auto", momentum=-0.5)
        ),
    }


def main() -> None:
    """Draw and print."""
    pipe = load_digits_pipeline()
    prompts = [f"a photo of the digit {word}" for word in WORDS]
    rows = []
    for scale in SCALES:
        for name, guider in guiders().items():
            noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
            with hfnoise.guide(pipe, guider):
                rows += pipe(prompts, guidance_scale=scale, num_inference_steps=STEPS, generator=noise).images
            evaluations = guider.report if guider else f"{2 * STEPS * len(prompts)} evaluations"
            print(f"{name:18} scale {scale:4}: {evaluations}")
    images = [image.resize((64, 64)) for image in rows]
    make_image_grid(images, rows=len(images) // len(prompts), cols=len(prompts)).save("guidance_digits.png")
    print("guidance_digits.png: rows as above, from the top")


if __name__ == "__main__":
    main()
