"""Trains the module of One More Step for the shaded digits, with its terminal prior. Offline, two minutes on a CPU.

    python examples/one_more_step/digits.py --config examples/configs/one_more_step_digits.yaml

It needs scikit-learn, whose digits are the training images. Options on the command line win over those of the file.
What comes out is shipped as model_cards/shaded-digits-oms; `python -m hfnoise.benchmarks.one_more_step_digits` says
how good it is.
"""

import torch
from datasets import Array3D, Dataset, Features, Value
from trl import TrlParser

from hfnoise import OneMoreStepTrainer, OneMoreStepTrainingArguments, TimeFreeUNet2DConditionModel
from hfnoise.trainers.diffusion_latents import encode_prompts, precompute_latents
from hfnoise.worlds.digits_checkpoints import checkpoint_path, load_digits_pipeline
from hfnoise.worlds.shaded_digits import SHADED_DIGITS

CHECKPOINT = "shaded-digits-sd"
# At most so many, spread over the digits.
TRAIN_ROWS, EVAL_ROWS = 9000, 3564


def make_rows(pipe, images, templates, count, seed):
    """Return latents and prompt states of images, each with a prompt of one of the templates at random."""
    images = images[torch.linspace(0, len(images) - 1, min(count, len(images))).long()]
    chosen = torch.randint(len(templates), (len(images),), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [
        SHADED_DIGITS.prompt(labels, templates[number])
        for labels, number in zip(images.labels.tolist(), chosen, strict=True)
    ]
    features = Features({"image": Array3D(images.images.shape[1:], "float32"), "text": Value("string")})
    rows = Dataset.from_dict({"image": images.images.numpy(), "text": texts}, features=features)
    # The mean of each image's latents, on which the UNet of this world was trained.
    return precompute_latents(rows.with_format("torch"), pipe, batch_size=256, seed=None)


def main():
    """Train, and write the module with its card to `output_dir`."""
    (args,) = TrlParser((OneMoreStepTrainingArguments,)).parse_args_and_config()
    torch.manual_seed(args.seed)
    pipe = load_digits_pipeline(CHECKPOINT)
    module = TimeFreeUNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=pipe.unet.config.cross_attention_dim,
    )  # fmt: skip
    train, test = SHADED_DIGITS.load()
    trainer = OneMoreStepTrainer(
        module,
        args,
        train_dataset=make_rows(pipe, train, SHADED_DIGITS.templates, TRAIN_ROWS, seed=0),
        # The terminal prior is fitted on these: digits of other writers, with prompts that name the background.
        eval_dataset=make_rows(
            pipe, test, [one for one in SHADED_DIGITS.templates if "{background}" in one], EVAL_ROWS, seed=1
        ),
        empty_prompt=encode_prompts(pipe, [""]),
    )
    trainer.pipeline_name = checkpoint_path(CHECKPOINT)  # for the card
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(license="apache-2.0", tags=["digits"])


if __name__ == "__main__":
    main()
