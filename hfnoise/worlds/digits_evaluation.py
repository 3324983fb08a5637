"""What the cards of the digits checkpoints report: scores at several guidance scales, and a picture of samples.

The figures of a shipped checkpoint, anew::

    python -m hfnoise.worlds.digits_evaluation --checkpoint digits-sd
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from hfnoise.cards import number, share_text
from hfnoise.worlds.digit_world import DigitWorld
from hfnoise.worlds.digits_checkpoints import CHECKPOINTS, checkpoint_path, load_digits_pipeline
from hfnoise.worlds.digits_score import score_digit_images

if TYPE_CHECKING:
    from PIL.Image import Image

GUIDANCE_SCALES = (1.0, 2.0, 4.0, 7.5)
NUM_INFERENCE_STEPS = 10
PICTURE_SCALES = (1.0, 4.0, 7.5)
_SEED = 1234
_BATCH = 250
_PICTURE_COLUMNS = 20
_PICTURE_ZOOM = 3


def evaluate(name: str | Path, world: DigitWorld, images: int = 500, seed: int = _SEED) -> list[dict[str, Any]]:
    """Return scores at [`GUIDANCE_SCALES`], for combinations that were trained on and for those that were held out.

    Args:
        name (`str` or `Path`): of the checkpoint.
        world ([`DigitWorld`]): what it draws.
        images (`int`, defaults to `500`): at least so many for each row; every combination equally often.
        seed (`int`, defaults to `1234`): of the noise, the same at all scales.

    Returns:
        For each row `combinations` (`"trained on"` or `"held out"`), `guidance_scale`, `images` and the fields of
        [`DigitScores`].

    Example:
        >>> from hfnoise.worlds.digits import DIGITS
        >>> from hfnoise.worlds.digits_evaluation import evaluate
        >>> evaluate("digits-sd", DIGITS)[2]["judge_accuracy"] > 0.97  # doctest: +SKIP
        True
    """
    pipe = load_digits_pipeline(name)
    every = world.combinations()
    held_out = world.is_held_out(every)
    rows = []
    for which, combinations, reference in (
        ("trained on", every[~held_out], "all"),
        ("held out", every[held_out], "held_out"),
    ):
        if not len(combinations):
            continue
        labels = combinations.repeat_interleave(-(-images // len(combinations)), dim=0)
        for scale in GUIDANCE_SCALES:
            drawn = draw(pipe, world, labels, scale, seed)
            scores = asdict(score_digit_images(drawn, labels, name, reference))
            rows.append({"combinations": which, "guidance_scale": scale, "images": len(labels), **scores})
    return rows


def draw(
    pipe: Any, world: DigitWorld, labels: torch.Tensor, guidance_scale: float, seed: int = _SEED, **options: Any
) -> torch.Tensor:
    """Return one image in [0, 1] for each row of labels; with one seed a row starts from the same noise at all scales.

    Args:
        pipe (`StableDiffusionPipeline`): of the world.
        world ([`DigitWorld`]): whose prompts.
        labels (`torch.Tensor` of shape `(count, attributes)`): what to ask for.
        guidance_scale (`float`): of classifier-free guidance; 1 is none.
        seed (`int`, defaults to `1234`): of the noise.
        **options: more of the call of the pipeline; 10 steps by default.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits import DIGITS
        >>> from hfnoise.worlds.digits_checkpoints import load_digits_pipeline
        >>> from hfnoise.worlds.digits_evaluation import draw
        >>> draw(load_digits_pipeline(), DIGITS, torch.tensor([[7]]), 2.0, num_inference_steps=2).shape
        torch.Size([1, 1, 16, 16])
    """
    prompts = [world.prompt(row) for row in labels.tolist()]
    size = pipe.unet.config.sample_size
    shape = (len(prompts), pipe.unet.config.in_channels, size, size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    settings = {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": guidance_scale, **options}
    parts = [
        pipe(prompts[start : start + _BATCH], latents=noise[start : start + _BATCH], output_type="pt", **settings)
        for start in range(0, len(prompts), _BATCH)
    ]
    return torch.cat([part.images for part in parts])


def samples_picture(name: str | Path, world: DigitWorld) -> Image:
    """Return a picture with a row for each of [`PICTURE_SCALES`]; a column has one prompt and one noise.

    It shows combinations that were held out, if there are some.

    Args:
        name (`str` or `Path`): of the checkpoint.
        world ([`DigitWorld`]): what it draws.

    Example:
        >>> from hfnoise.worlds.digits import DIGITS
        >>> from hfnoise.worlds.digits_evaluation import samples_picture
        >>> samples_picture("digits-sd", DIGITS).save("samples.png")  # doctest: +SKIP
    """
    from PIL import Image

    pipe = load_digits_pipeline(name)
    every = world.combinations()
    held_out = world.is_held_out(every)
    chosen = every[held_out] if held_out.any() else every
    labels = chosen[torch.linspace(0, 2 * len(chosen) - 1, _PICTURE_COLUMNS).long() % len(chosen)]
    # With a grey line behind every image, or neighbours run into each other.
    rows = [
        torch.cat([F.pad(image, (0, 1, 0, 1), value=0.5) for image in draw(pipe, world, labels, scale)], dim=2)
        for scale in PICTURE_SCALES
    ]
    pixels = (255 * torch.cat(rows, dim=1)).round().byte().permute(1, 2, 0)
    picture = Image.fromarray(pixels.squeeze(2).numpy() if world.channels == 1 else pixels.numpy())
    return picture.resize((picture.width * _PICTURE_ZOOM, picture.height * _PICTURE_ZOOM), Image.Resampling.NEAREST)


def table(rows: list[dict[str, Any]], world: DigitWorld) -> str:
    """Return the rows of [`evaluate`] as a Markdown table.

    Args:
        rows (`list[dict]`): what [`evaluate`] returned.
        world ([`DigitWorld`]): names the attributes, if there are several.
    """
    attributes = list(world.attributes) if len(world.attributes) > 1 else []
    head = ["guidance scale", "images", "right (judge)", "right (verifier)", *attributes]
    head += ["Fréchet distance", "diversity"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        shares = [row["judge_accuracy"], row["verifier_accuracy"], *(row["attribute_accuracy"] if attributes else [])]
        cells = [
            f"{row['guidance_scale']:g}",
            str(row["images"]),
            *[share_text(share, row["images"]) for share in shares],
        ]
        lines.append([*cells, number(row["frechet_distance"], 2), number(row["diversity"], 2)])
    if world.held_out is not None:
        first = ["combinations", "---", *[row["combinations"] for row in rows]]
        lines = [[cell, *line] for cell, line in zip(first, lines, strict=True)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Print the table of a checkpoint."""
    parser = argparse.ArgumentParser(description="Score a checkpoint of the digits worlds at several guidance scales.")
    parser.add_argument("--checkpoint", choices=list(CHECKPOINTS), default="digits-sd")
    parser.add_argument("--images", type=int, default=500, help="at least so many in a row; default: %(default)s")
    parser.add_argument("--seed", type=int, default=_SEED, help="of the noise; default: %(default)s")
    options = parser.parse_args()
    world = CHECKPOINTS[options.checkpoint]
    print(table(evaluate(checkpoint_path(options.checkpoint), world, options.images, options.seed), world))


if __name__ == "__main__":
    main()
