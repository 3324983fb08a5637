"""Trains a module of One More Step with its terminal prior, and compares where sampling starts. Offline, a minute.

    python examples/one_more_step/brightness.py

In the brightness world every image is of one shade, dark, grey or bright as the prompt says, and the base model is
exactly right about it; from white noise it draws everything in mid brightness all the same. While it trains,
`eval_low_frequency_r2` rises to what the prompts say about the brightness, 0.92 in expectation. Then the Wasserstein-1
distance of the brightness of samples from that of real images is printed, for one seed.
"""

import torch

from hfnoise import OneMoreStep, OneMoreStepTrainer, OneMoreStepTrainingArguments, guide
from hfnoise.worlds.brightness import (
    ROWS,
    SPREAD,
    TEST_ROWS,
    brightness_error,
    brightness_rows,
    draw_latents,
    draw_prompts,
    empty_states,
    new_brightness_module,
    new_brightness_pipeline,
    prompt_states,
)

STEPS = 300
IMAGES, SIZE, SAMPLING_STEPS = 600, 32, 50
FOLDER = "brightness_oms_module"


def train():
    """Return the trainer of a module that it has written, with its terminal prior, to a folder."""
    args = OneMoreStepTrainingArguments(
        output_dir=FOLDER, max_steps=STEPS, per_device_train_batch_size=16, per_device_eval_batch_size=128,
        learning_rate=4e-3, lr_scheduler_type="cosine", warmup_steps=STEPS // 10, logging_steps=STEPS // 3,
        eval_strategy="steps", eval_steps=STEPS // 3, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    trainer = OneMoreStepTrainer(
        new_brightness_module(),
        args,
        train_dataset=brightness_rows(ROWS, generator),
        eval_dataset=brightness_rows(TEST_ROWS, generator),
        empty_prompt={"encoder_hidden_states": empty_states(1)},
    )
    trainer.train()
    trainer.save_model()
    return trainer


def compare():
    """Return, for each start, the error of the brightness, and its spread within a prompt."""
    generator = torch.Generator().manual_seed(1)
    prompts = draw_prompts(IMAGES, generator)
    real, other = (draw_latents(prompts, SIZE, generator) for _ in range(2))
    starts = {
        "white noise": None,
        "One More Step": OneMoreStep.from_pretrained(FOLDER, terminal_prior=False),
        "with terminal prior": OneMoreStep.from_pretrained(FOLDER),
    }
    drawn = {"real images": other}
    pipe = new_brightness_pipeline(size=SIZE)
    for name, start in starts.items():
        with guide(pipe, initial_noise=start):
            drawn[name] = pipe(
                prompt_embeds=prompt_states(prompts), num_inference_steps=SAMPLING_STEPS, guidance_scale=1.0,
                height=8 * SIZE, width=8 * SIZE, output_type="latent", generator=torch.Generator().manual_seed(2),
            ).images  # fmt: skip
    found = {}
    for name, images in drawn.items():
        brightness = images.mean((1, 2, 3))
        spread = sum(float(brightness[prompts == prompt].std()) for prompt in (0, 2)) / 2
        found[name] = brightness_error(images, real, prompts), spread
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    train()
    print(f"{'start':20} {'W1 of the brightness':>21} {f'spread (true {SPREAD})':>19}")
    for name, (error, spread) in compare().items():
        print(f"{name:20} {error:21.4f} {spread:19.3f}")
