"""The options of guided generation: of each guider, and of a run of `hfnoise generate`."""

from __future__ import annotations

from hfnoise.latents_options import START_OPTIONS
from hfnoise.options import Option

_SPACE = Option(
    "space",
    "str",
    "x0",
    "What the rules work on: 'x0'; 'model', the raw output; for the similarity also 'v' and 'eps', where the "
    "thresholds of papers end guidance at the first step.",
)

ADAPTIVE_GUIDANCE_OPTIONS = (
    Option(
        "threshold",
        "float",
        0.999,
        "Similarity of both predictions, in (0, 1], at which a sample needs no unconditional one any more: 0.999 is "
        "close to full guidance, 0.99 saves more.",
    ),
    _SPACE,
    Option("min_steps", "float", 0.1, "Share of the steps that are guided in any case, in [0, 1]."),
    Option("patience", "int", 1, "Consecutive steps at which the threshold is to be reached."),
)

PROJECTED_GUIDANCE_OPTIONS = (
    Option("eta", "float", 0.0, "What is kept of the part of the update that only saturates; 1 keeps all of it."),
    Option(
        "norm_threshold",
        "float or 'auto'",
        None,
        "Largest norm of the update in x0; without it there is none. The paper's: 15 (SDXL), 5 (DiT), 2.5 (EDM2-S); "
        "'auto' is SDXL's, scaled to the size of the latents.",
    ),
    Option(
        "momentum",
        "float",
        None,
        "In (-1, 1), below 0 against oscillation. The paper's: -0.5 (SDXL, DiT), -0.75 (EDM2-S).",
    ),
    _SPACE,
)

LINEAR_GUIDANCE_OPTIONS = (
    Option(
        "policy",
        "str",
        "alternate",
        "Which steps are evaluated, the others being estimated: 'alternate'; of the first half only every second, "
        "'alternate_then_estimate', or all, 'full_then_estimate'.",
    ),
    Option(
        "coefficients",
        "str",
        None,
        "JSON file of hfnoise.guidance.LinearCoefficients; without it the last update is held.",
    ),
)

GENERATE_OPTIONS = (
    Option(
        "model_name_or_path",
        "str",
        None,
        "A Hub id, a folder of a diffusers pipeline, or an embedded one: digits, digits-weak, coloured-digits, "
        "shaded-digits.",
    ),
    Option("revision", "str", None, "Branch, tag or commit on the Hub."),
    Option("prompt", "list of str", None, "What to draw; several of them, or the option several times."),
    Option("prompts_file", "str", None, "Text file with a prompt on each line, in the place of prompt."),
    Option("negative_prompt", "str", None, "What not to draw; the same for all prompts."),
    Option("num_inference_steps", "int", None, "Steps. Default: the pipeline's."),
    Option(
        "guidance_scale",
        "float",
        None,
        "Strength of the guidance, whatever the pipeline calls it (Flux and Qwen-Image: true_cfg_scale); 1 is none. "
        "Default: the pipeline's.",
    ),
    Option("num_images_per_prompt", "int", 1, "Images, or videos, for each prompt."),
    Option(
        "seed",
        "int",
        0,
        "Of the first sample, and one more for each next: the noise of a sample does not depend on batch_size.",
    ),
    Option("batch_size", "int", 4, "Samples that are denoised together."),
    Option("height", "int", None, "Pixels, with width. Default: the pipeline's."),
    Option("width", "int", None, "Pixels, with height. Default: the pipeline's."),
    Option("num_frames", "int", None, "Of a video. Default: the pipeline's."),
    Option("dtype", "str", None, "float32, float16 or bfloat16. Default: float32 on a CPU, bfloat16 elsewhere."),
    Option("device", "str", None, "Such as cpu or cuda:1. Default: the accelerator, if there is one."),
    Option(
        "guider",
        "str",
        "adaptive",
        "adaptive, projected, linear, several of them joined by +; saved: the one in the repository; none: the "
        "pipeline's own guidance.",
    ),
    Option(
        "output_dir",
        "str",
        "generated",
        "Folder for images, report, plot and the command; those of an earlier run there are replaced.",
    ),
)

# Of the command line: what is in two of them is one option.
GUIDER_OPTIONS: dict[str, tuple[Option, ...]] = {
    "adaptive": ADAPTIVE_GUIDANCE_OPTIONS,
    "linear": LINEAR_GUIDANCE_OPTIONS,
    "projected": PROJECTED_GUIDANCE_OPTIONS,
}
ALL_GENERATE_OPTIONS: tuple[Option, ...] = tuple(
    dict.fromkeys(
        [
            *GENERATE_OPTIONS,
            *(option for options in GUIDER_OPTIONS.values() for option in options),
            *START_OPTIONS,
        ]
    )
)
