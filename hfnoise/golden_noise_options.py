"""The options of golden noise: of its training, and of what `hfnoise golden-noise` needs beside."""

from __future__ import annotations

from hfnoise.options import Option

GOLDEN_NOISE_OPTIONS = (
    Option(
        "loss",
        "str",
        "pairs",
        "'pairs': the squared error of the change from noise to golden noise; 'reward': minus a differentiable reward "
        "of images from the refined noise, for models of a few steps.",
    ),
    Option(
        "min_margin",
        "float",
        None,
        "Pairs whose golden noise is not better by more than this, in units of the verifier, count nothing.",
    ),
    Option(
        "margin_temperature",
        "float",
        None,
        "Pairs count sigmoid(margin / this), above 0, so that doubtful ones count less; this or min_margin.",
    ),
    Option("delta_penalty", "float", 0.01, "Of the loss 'reward': weight of half the squared size of the change."),
    Option("learning_rate", "float", 1e-3, "Of AdamW; the official code has 1e-4, constant."),
    Option("weight_decay", "float", 1e-2, "Of AdamW."),
    Option("lr_scheduler_type", "str", "cosine", "How the learning rate falls."),
)

# Of the command line only: in Python the rows are made by collect_noise_pairs.
NOISE_PAIR_OPTIONS = (
    Option(
        "model_name_or_path",
        "str",
        None,
        "The pipeline that the network is for: a Hub id, a folder, or an embedded one: digits, digits-weak, "
        "coloured-digits, shaded-digits.",
    ),
    Option("model_revision", "str", None, "Branch, tag or commit of the pipeline on the Hub."),
    Option("variant", "str", None, "Of the pipeline's weights, such as fp16."),
    Option("dtype", "str", None, "Of the pipeline's weights. Default: float32 on a CPU, bfloat16 elsewhere."),
    Option("prompts_file", "str", None, "Text file with a prompt on each line; this or dataset_name."),
    Option(
        "dataset_name",
        "str",
        None,
        "Dataset of prompts: a Hub id, a local file or folder, or an embedded one: hfnoise:digits, "
        "hfnoise:coloured-digits, hfnoise:shaded-digits.",
    ),
    Option("dataset_config", "str", None, "Configuration of the dataset on the Hub."),
    Option("dataset_train_split", "str", "train", "Split that has the prompts."),
    Option("caption_column", "str", "text", "Column of prompts."),
    Option("max_prompts", "int", None, "Take so many of the prompts, the first ones. Default: all."),
    Option("noises_per_prompt", "int", None, "Pairs of each prompt. Default: 1."),
    Option("pairs_dir", "str", None, "Folder of the pairs, gone on with if it has some. Default: output_dir-pairs."),
    Option("pair_batch_size", "int", 8, "Images that are made together, of pairs and of the evaluation."),
    Option(
        "redenoise_steps", "int", None, "Golden noise is a step of so many. Default: 10, unless a strength is given."
    ),
    Option("redenoise_strength", "float", None, "Golden noise by its strength, above 0, in place of redenoise_steps."),
    Option("num_inference_steps", "int", None, "Of images that are judged. Default: the pipeline's."),
    Option("guidance_scale", "float", None, "Of images that are judged. Default: the pipeline's."),
    Option("height", "int", None, "Of the images, in pixels. Default: the pipeline's."),
    Option("width", "int", None, "Of the images, in pixels. Default: the pipeline's."),
    Option(
        "verifier",
        "str",
        None,
        "What judges images: an embedded world (digits, coloured-digits, ...), or a model of images and text of "
        "transformers by Hub id or folder, such as CLIP or PickScore. Scores the pairs, and the network at the end.",
    ),
    Option("verifier_processor", "str", None, "Where the processor of that model is. Default: with the model."),
    Option(
        "validation_size",
        "float",
        None,
        "Share of the pairs that is evaluated on, in [0, 1); 0 for none. Default: 0.1.",
    ),
    Option(
        "eval_images",
        "int",
        None,
        "Images from noise and from refined noise that the verifier compares at the end. Default: 64.",
    ),
)

NOISE_NET_OPTIONS = (
    Option(
        "architecture",
        "str",
        None,
        "Of a new network: 'noise-prompt-net', ours, or 'npnet', of the shape of the official one. Default: "
        "noise-prompt-net.",
    ),
    Option("npnet", "str", None, "Go on from this network, a Hub id or a folder; its architecture is its own."),
    Option(
        "net_options",
        "dict",
        None,
        "Options of a new network, as of NoisePromptNet or NPNet: JSON, or a mapping in the YAML file. Sizes of "
        "latents and text are known.",
    ),
)
