"""The settings with which the checkpoints of the worlds of digits were trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DigitsRecipe:
    """Settings of a world of digits; the defaults are those of `digits-sd`.

    The shaded digits have a noise schedule of their own, with `beta_end=0.005`. How well a model reads the brightness
    of an image from the noise, at the end of the schedule, is up to h w alpha_bar / (1 - alpha_bar): noise averages
    out over the h x w numbers of a channel, and brightness does not. With the schedule of Stable Diffusion that is
    19.2 at 64 x 64, 4.8 at 32 x 32 (images of 256 pixels), and 0.3 at the 8 x 8 of this world, whose model would have
    next to nothing to read. With this one it is 4.9. To go all the way to 19 (`beta_end=0.0022`) is too much of it:
    the shape of a digit is as coarse as brightness is, other than the detail of photographs, so that from white noise
    most digits come out wrong too.

    Args:
        width (`int`, defaults to `24`): of the UNet, see [`new_digits_pipeline`].
        steps (`int`, defaults to `1247`): of the UNet; 445 makes the weak checkpoint.
        text_steps (`int`, defaults to `250`): of the text encoder, which then stays as it is.
        vae_steps (`int`, defaults to `500`): of the autoencoder.
        variants (`int`, defaults to `8`): of every image that the UNet sees, 1 untouched and the others augmented.
        classifier_epochs (`int`, defaults to `15`): of verifier and judge.
        batch_size (`int`, defaults to `64`): images per step.
        learning_rate (`float`, defaults to `3e-3`): peak of a cosine schedule, for the UNet.
        prompt_dropout (`float`, defaults to `0.1`): share of the images that are learned without prompt, in [0, 1].
        beta_end (`float`, defaults to `0.012`): of the noise schedule, "scaled_linear" from 0.00085, in (0, 1);
            Stable Diffusion's by default.
        evaluation_images (`int`, defaults to `500`): drawn at every guidance scale for the card.
        seed (`int`, defaults to `0`): of everything.

    Raises:
        ValueError: if a count is below 1, a share is none, or `beta_end` is out of range.
    """

    width: int = 24
    steps: int = 1247
    text_steps: int = 250
    vae_steps: int = 500
    variants: int = 8
    classifier_epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 3e-3
    prompt_dropout: float = 0.1
    beta_end: float = 0.012
    evaluation_images: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name)
            for name in (
                "steps", "text_steps", "vae_steps", "variants", "classifier_epochs", "batch_size", "evaluation_images"
            )
        }  # fmt: skip
        if min(counts.values()) < 1:
            raise ValueError(f"steps, epochs and numbers of images must be at least 1, got {counts}.")
        if not 0 <= self.prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout must lie in [0, 1], got {self.prompt_dropout}.")
        if not 0 < self.beta_end < 1:
            raise ValueError(f"beta_end must lie between 0 and 1, got {self.beta_end}; Stable Diffusion has 0.012.")


# Of the UNet, for `digits-sd-weak`: a third of the training.
WEAK_STEPS = 445
# By the name of the world. Every coloured digit is there in ten versions already, and every shaded one in six, so one
# more of each is enough.
RECIPES = {
    "digits": DigitsRecipe(),
    "coloured-digits": DigitsRecipe(steps=1000, classifier_epochs=6, variants=2),
    "shaded-digits": DigitsRecipe(vae_steps=700, classifier_epochs=6, variants=2, beta_end=0.005),
}
