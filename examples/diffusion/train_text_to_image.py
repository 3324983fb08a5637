"""Fine-tunes the UNet of a Stable Diffusion pipeline on images with captions by DiffusionTrainer: whole, or by LoRA.

    python examples/diffusion/train_text_to_image.py --config examples/configs/text_to_image.yaml
    accelerate launch --config_file examples/accelerate/two_cpu_processes.yaml \
        examples/diffusion/train_text_to_image.py --config examples/configs/text_to_image.yaml
    accelerate launch --multi_gpu --num_processes 8 examples/diffusion/train_text_to_image.py \
        --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name my_images --resolution 512 \
        --lora_r 16 --snr_gamma 5 --prompt_dropout 0.1 --learning_rate 1e-4 --bf16 --output_dir my-lora --push_to_hub

The first one runs offline, in less than two minutes on one CPU core. Images are encoded before training and kept, so
that the autoencoder and the text encoder are no part of a step. Options are those of DiffusionTrainingArguments,
`--model_name_or_path`, `--dataset_name` and what else `hfnoise one-more-step --help` says of pipeline and images, and
those of LoRA below.
"""

import sys
from dataclasses import dataclass, field

from hfnoise import DiffusionTrainer, DiffusionTrainingArguments
from hfnoise.errors import PushError, UsageError
from hfnoise.trainers.command_line import parse
from hfnoise.trainers.encoded_images import encode_images, load_training_pipeline, name_pipeline
from hfnoise.trainers.image_arguments import ImageScriptArguments
from hfnoise.trainers.launch import save, share

NEEDED = {"model_name_or_path": "a Hub id, a folder, or digits", "dataset_name": "a Hub id, a folder or a file"}


@dataclass
class LoraArguments:
    """Which adapter to train; without `lora_r` all weights are trained."""

    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapter; without it all is trained."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapter. Default: its rank."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"], metadata={"help": "Layers that are adapted."}
    )

    def config(self):
        """Return the configuration of the adapter, if there is to be one."""
        if self.lora_r is None:
            return None
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r, lora_alpha=self.lora_alpha or self.lora_r, target_modules=self.lora_target_modules,
            init_lora_weights="gaussian",
        )  # fmt: skip


def make_trainer(script, training, lora):
    """Return the trainer of what a command line asks for."""
    pipe = load_training_pipeline(script, training.device)
    data = encode_images(script, training, pipe)
    trainer = DiffusionTrainer(
        pipe.unet,
        training,
        scheduler=pipe.scheduler,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        empty_prompt=data.empty_prompt,
        peft_config=lora.config(),
    )
    name_pipeline(trainer, script)  # for the card
    return trainer


def main(arguments):
    """Train, save and say what came out; return the exit code."""
    types = (ImageScriptArguments, DiffusionTrainingArguments, LoraArguments)
    try:
        script, training, lora = parse("train_text_to_image.py", types, arguments, NEEDED)
        trainer = make_trainer(script, training, lora)
        checkpoint = trainer.checkpoint_to_resume(training.resume_from_checkpoint)
    except (UsageError, ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    before = None if trainer.eval_dataset is None else trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=checkpoint)
    after = None if trainer.eval_dataset is None else trainer.evaluate()["eval_loss"]
    save(trainer, training, script)
    if trainer.is_world_process_zero():
        if before is not None:
            print(f"loss at fixed noise, on images that were held out: {before:.4f} before, {after:.4f} after")
        print(f"weights and card, which says how to load them, are in {training.output_dir}")
    try:
        share(trainer, training, script)
    except PushError as error:
        print(error, file=sys.stderr)
        return 1
    trainer.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
