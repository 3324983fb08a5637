"""The options about where sampling starts: of a run of `hfnoise generate`, and of training what starts it."""

from __future__ import annotations

from hfnoise.options import Option

ONE_MORE_STEP_OPTIONS = (
    Option(
        "prompt_dropout",
        "float",
        0.1,
        "Share of examples with the empty prompt, in [0, 1]; 0 for a module that is never used with a guidance scale "
        "of its own.",
    ),
    Option("ema_decay", "float", 0.999, "Decay of an average of the weights, which is what is saved, in (0, 1)."),
    Option(
        "residual_samples",
        "int",
        4096,
        "Rows that the terminal prior is fitted on after training, at least 2; 0 for no prior.",
    ),
    Option(
        "residual_frequencies",
        "int",
        1,
        "Along each side, that the terminal prior has; 1 is the channel means only.",
    ),
    Option("learning_rate", "float", 1e-4, "Of AdamW; the recipe is ours, since none was published."),
    Option("weight_decay", "float", 1e-2, "Of AdamW."),
)

# Of the command line only: in Python the rows are a dataset of latents.
IMAGE_DATA_OPTIONS = (
    Option(
        "model_name_or_path",
        "str",
        None,
        "The pipeline whose autoencoder and text encoder make the rows: a Hub id, a folder, or an embedded one: "
        "digits, digits-weak, coloured-digits, shaded-digits.",
    ),
    Option("model_revision", "str", None, "Branch, tag or commit of the pipeline on the Hub."),
    Option("variant", "str", None, "Of the pipeline's weights, such as fp16; they are encoded with in float32."),
    Option(
        "dataset_name",
        "str",
        None,
        "Images with captions: a Hub id, a folder of images (with metadata.csv), a csv, json or parquet file, a "
        "folder of save_to_disk, or an embedded one: hfnoise:digits, hfnoise:coloured-digits, hfnoise:shaded-digits.",
    ),
    Option("dataset_config", "str", None, "Configuration of the dataset on the Hub."),
    Option("dataset_train_split", "str", "train", "Split to train on."),
    Option("dataset_test_split", "str", "test", "Split to evaluate on."),
    Option(
        "validation_size",
        "float",
        0.05,
        "Of the training split, where there is none to evaluate on: a share below 1, or a number of rows; 0 for no "
        "evaluation.",
    ),
    Option("image_column", "str", "image", "Column of images, or of the names of their files."),
    Option("caption_column", "str", "text", "Column of captions."),
    Option(
        "resolution",
        "int",
        None,
        "Crop images to their middle square and resize them to so many pixels. Default: as they are, of one size.",
    ),
    Option(
        "posterior",
        "str",
        "sample",
        "What is taken of the autoencoder's posterior of an image: 'sample', one draw, or 'mean', which the embedded "
        "pipelines were trained on.",
    ),
    Option("encode_batch_size", "int", 8, "Images that are encoded together."),
    Option(
        "latents_dir",
        "str",
        None,
        "Folder where latents and prompt states are kept for the next run. Default: in the cache of datasets.",
    ),
)

MODULE_OPTIONS = (
    Option(
        "world",
        "str",
        None,
        "'brightness': train on that embedded world, in the place of a pipeline and a dataset.",
    ),
    Option("module_name_or_path", "str", None, "Go on from this module; the sizes below are then its own."),
    Option("module_variant", "str", None, "Of that module's weights; fp16 for the published ones."),
    Option(
        "block_out_channels",
        "list of int",
        None,
        "Width of each level. Default: 160 320 640, as the published base modules; far smaller ones do, since the "
        "best answer is the mean of the images of a prompt, and smooth.",
    ),
    Option("layers_per_block", "int", None, "Residual blocks of a level. Default: 2."),
    Option("transformer_layers_per_block", "list of int", None, "Of each level, or one for all. Default: 1."),
    Option(
        "attention_head_dim",
        "list of int",
        None,
        "As in UNet2DConditionModel of diffusers: the number of heads of each level. Default: a head for 32 channels.",
    ),
    Option("norm_num_groups", "int", None, "Of group norms. Default: up to 32, as many as all widths allow."),
)

# What a run of `hfnoise generate` may start from, in the order of the chain: the option that asks for it, first, and
# those that belong to it. Where a repository holds one of that name, the others change what is saved there.
INITIAL_NOISE_OPTIONS: dict[str, tuple[Option, ...]] = {
    "seed_variation": (
        Option(
            "seed_variation",
            "float",
            None,
            "Variations of the images: share, in [0, 1], of the noise of another seed.",
        ),
        Option("variation_seed", "int", None, "That seed. Default: as saved, or another one for each image."),
    ),
    "redenoise": (
        Option(
            "redenoise",
            "bool",
            None,
            "Golden noise by the model itself, at three evaluations; it acts as more guidance.",
        ),
        Option("redenoise_strength", "float", None, "Of it, above 0. Default: as saved, or a step of 10."),
    ),
    "noise_level_guidance": (
        Option(
            "noise_level_guidance",
            "int",
            None,
            "So many small steps of the noise towards the prompt, at least 1; two evaluations each.",
        ),
    ),
    "npnet": (
        Option(
            "npnet",
            "str",
            None,
            "Golden noise by a network: a Hub id or folder of NoisePromptNet or NPNet, or of a pipeline that has one, "
            "or the file of an official checkpoint.",
        ),
        Option("npnet_scale", "float", None, "Of its change, at least 0, where 0 is off. Default: as saved."),
    ),
    "search": (
        Option(
            "search",
            "str",
            None,
            "Start from the best of several noises: random (best of N), zero_order (from neighbour to neighbour) or "
            "path; needs budget and verifier.",
        ),
        Option("budget", "int", None, "Evaluations of the denoiser that the search may spend on an image."),
        Option(
            "verifier",
            "str",
            None,
            "What the search compares images by: an embedded world (digits, ...), or a model of images and text of "
            "transformers by Hub id or folder, such as CLIP or PickScore; several are joined by +.",
        ),
        Option("preview_steps", "int", None, "Compare images of so many steps. Default: of all steps."),
    ),
    "oms_module": (
        Option(
            "oms_module",
            "str",
            None,
            "One More Step, images as dark and as bright as the prompt says: a Hub id or folder of its module, or of "
            "a pipeline that has one.",
        ),
        Option("oms_variant", "str", None, "Of the module's weights; fp16 for the published ones."),
        Option("oms_eta", "float", None, "Share of fresh noise, in [0, 1]. Default: as saved, or 0."),
        Option(
            "oms_guidance_scale",
            "float",
            None,
            "Of the module's estimate; more exaggerates brightness and colour, and costs a second evaluation. "
            "Default: as saved, or 1.",
        ),
        Option("oms_scale", "float", None, "Of the estimate, at least 0, where 0 is off. Default: as saved, or 1."),
    ),
    "brightness": (
        Option(
            "brightness",
            "float",
            None,
            "Brighter or darker images without a module, in [-1, 1]: -1 is black, 1 white; on top of what else is "
            "asked for.",
        ),
    ),
}

INITIAL_NOISE_OPTION = Option(
    "initial_noise",
    "str",
    None,
    "saved: the one in the repository, which must have one; none: not that one, if it has. Default: if it has one, "
    "unless another one takes its place.",
)

START_OPTIONS: tuple[Option, ...] = (
    INITIAL_NOISE_OPTION,
    *(option for options in INITIAL_NOISE_OPTIONS.values() for option in options),
)
