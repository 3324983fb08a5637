"""Brightness of drawn digits against where sampling starts: white noise, One More Step, the terminal prior.

`python -m hfnoise.benchmarks.one_more_step_digits` draws the shaded digits (hfnoise/worlds/shaded_digits.py) with the
shipped pipeline and the shipped module, compares the brightness of the images with that of real ones that neither has
seen, and writes one_more_step_digits.json, .md and .png. The real images need scikit-learn.

Grey and open prompts are there for what One More Step cannot do: their mean is that of white noise already. On grey
backgrounds the terminal prior, which has one spread for all prompts, makes the images scatter too much: whether the
ink is lighter or darker goes with the shade in the data, and the prior moves the shade only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hfnoise.benchmarks.one_more_step import FLOOR
from hfnoise.benchmarks.one_more_step_starts import LIMIT, MATCHED, OMS, WHITE, NoisedData
from hfnoise.benchmarks.reporting import circumstances, judge, markdown, mean_and_error, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.pipelines import OneMoreStep, StartEstimate, guide
from hfnoise.worlds.brightness import brightness_error
from hfnoise.worlds.digit_world import LabelledImages
from hfnoise.worlds.digits_checkpoints import (
    MODULES,
    load_digit_classifier,
    load_digits_pipeline,
    one_more_step_path,
)
from hfnoise.worlds.shaded_digits import ANY_BACKGROUND, BACKGROUNDS, SHADED_DIGITS

MODULE = "shaded-digits-oms"
ANY = "any"
# Of the dark and the bright prompts, without guidance: One More Step over white noise, and the terminal prior over One
# More Step. The 0.2 of the brightness world is for an exact denoiser with a smaller spread within a prompt.
OMS_SHARE, PRIOR_SHARE = 0.35, 0.8
_PICTURE_SCALE, _COLUMNS = 2.0, 20


def draw(
    pipe: Any, labels: torch.Tensor, template: str | None, start: StartEstimate | None, seed: int, **call: Any
) -> torch.Tensor:
    """Return images in [0, 1] of the prompts of labels; the noise is the same for every start.

    Args:
        pipe (`StableDiffusionPipeline`): of the shaded digits.
        labels (`torch.Tensor` of shape `(count, 2)`): background and digit to ask for.
        template (`str`, *optional*): of the prompts, by default that of the world.
        start ([`StartEstimate`], *optional*): white noise if `None`.
        seed (`int`): of the noise.
        **call: `guidance_scale`, `num_inference_steps`.
    """
    prompts = [SHADED_DIGITS.prompt(row, template) for row in labels.tolist()]
    with guide(pipe, initial_noise=start):
        return pipe(prompts, generator=torch.Generator().manual_seed(seed), output_type="pt", **call).images


def encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the latents of images in [-1, 1], on the scale of the UNet."""
    with torch.no_grad():
        return vae.encode(images).latent_dist.mean * vae.config.scaling_factor


def real_images(test: LabelledImages, word: str, count: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Return two sets of real images of a background with nothing in common, of any background for `any`."""
    rows = torch.arange(len(test))
    rows = rows if word == ANY else rows[test.labels[:, 0] == BACKGROUNDS.index(word)]
    if len(rows) < 2 * count:
        raise ValueError(f"there are {len(rows)} real images for {word!r}; --images can be at most {len(rows) // 2}.")
    chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return test[chosen[:count]], test[chosen[count : 2 * count]]


def starts(latents: torch.Tensor) -> dict[str, StartEstimate | None]:
    """Return every start by name; `latents` of real images are noised for the limit."""
    folder = one_more_step_path(MODULE)
    return {
        WHITE: None,
        OMS: OneMoreStep.from_pretrained(folder, terminal_prior=False),
        MATCHED: OneMoreStep.from_pretrained(folder),
        LIMIT: NoisedData(latents),
    }


def scores(images: torch.Tensor, reference: torch.Tensor, digits: torch.Tensor, classifier: Any) -> dict[str, float]:
    """Return the error of the brightness of images in [0, 1], its mean and spread, and how many digits are right."""
    brightness = images.double().flatten(1).mean(1)
    return {
        "error": brightness_error(images, reference, torch.zeros(len(images))),
        "mean": float(brightness.mean()),
        "spread": float(brightness.std()),
        "digit": float((classifier.predict(2 * images - 1)[:, 1] == digits).double().mean()),
    }


def run(
    pipe: Any, test: LabelledImages, seed: int, images: int, steps: int, scales: Sequence[float]
) -> dict[str, Any]:
    """Return the scores of one seed by guidance scale, background and start.

    Args:
        pipe (`StableDiffusionPipeline`): of the shaded digits.
        test ([`LabelledImages`]): real images.
        seed (`int`): of the noise, and of which real images are compared with.
        images, steps (`int`): of each background and start.
        scales (sequence of `float`): of guidance; 1 is none.
    """
    classifier = load_digit_classifier("judge", MODULES[MODULE])
    found: dict[str, Any] = {f"{scale:g}": {} for scale in scales}
    for word in tqdm((*BACKGROUNDS, ANY), desc=f"seed {seed}", leave=False):
        reference, other = (
            LabelledImages(part.images / 2 + 0.5, part.labels) for part in real_images(test, word, images, seed)
        )
        members = starts(encoded(pipe.vae, 2 * other.images - 1))
        for scale in scales:
            call = {"guidance_scale": scale, "num_inference_steps": steps}
            # The digits of the images that are noised are asked for.
            drawn = {
                name: draw(pipe, other.labels, ANY_BACKGROUND if word == ANY else None, member, seed, **call)
                for name, member in members.items()
            } | {FLOOR: other.images}
            found[f"{scale:g}"][word] = {
                name: scores(shown, reference.images, other.labels[:, 1], classifier) for name, shown in drawn.items()
            }
    return found


def theory(pipe: Any, test: LabelledImages, steps: int) -> dict[str, float]:
    """Return what an exact model of normally distributed channel means would give (hfnoise/worlds/brightness.py).

    Args:
        pipe (`StableDiffusionPipeline`): of the shaded digits.
        test ([`LabelledImages`]): real images.
        steps (`int`): of the scheduler.

    Returns:
        `variance` of the channel means within a word, summed over the channels; `ratio`, of signal to noise at the
        first step; `white_mean`, the share of the mean that is left from white noise; `oms_spread`, the share of the
        spread that is left from One More Step.
    """
    latents = encoded(pipe.vae, test.images)
    means = latents.flatten(2).mean(2)
    variance = sum(float(means[test.labels[:, 0] == word].var(0).sum()) for word in range(len(BACKGROUNDS)))
    variance /= len(BACKGROUNDS)
    pipe.scheduler.set_timesteps(steps)
    power = float(pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[0])])
    ratio = latents[0, 0].numel() * variance * power / (1 - power)
    rho_squared = ratio / (1 + ratio)
    return {
        "variance": variance, "ratio": ratio, "white_mean": 1 - math.sqrt(rho_squared),
        "oms_spread": math.sqrt(1 - rho_squared),
    }  # fmt: skip


def acceptance(runs: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Return what is claimed and whether it holds, on means over the seeds, at the first guidance scale."""
    scale = next(iter(runs[0]))

    def errors(start: str) -> float:
        words = (BACKGROUNDS[0], BACKGROUNDS[-1])
        return sum(mean_and_error([found[scale][word][start]["error"] for found in runs])[0] for word in words)

    def ratio(first: str, second: str, bound: float) -> tuple[str, bool]:
        share = errors(first) / errors(second)
        return f"error of dark and bright, {first} / {second}: {share:.3f} <= {bound}", share <= bound

    return [ratio(OMS, WHITE, OMS_SHARE), ratio(MATCHED, OMS, PRIOR_SHARE)]


def table(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: means over seeds, of the error with the standard error of the mean."""
    header = ["guidance", "background", "start", "brightness error", "mean", "spread", "digit right, %"]
    rows = []
    for scale, by_word in runs[0].items():
        for word, by_start in by_word.items():
            for start in by_start:
                columns = {
                    key: mean_and_error([found[scale][word][start][key] for found in runs])
                    for key in ("error", "mean", "spread", "digit")
                }
                error = f"{columns['error'][0]:.4f}" + (f" ± {columns['error'][1]:.4f}" if len(runs) > 1 else "")
                shown = [f"{columns[key][0]:.3f}" for key in ("mean", "spread")]
                rows.append([scale, word, start, error, *shown, f"{100 * columns['digit'][0]:.1f}"])
    return header, rows


def picture(pipe: Any, test: LabelledImages, seed: int, steps: int, path: Path) -> None:
    """Write images of dark and bright prompts by start, a column of one prompt and noise, over real ones."""
    from matplotlib.figure import Figure

    words = (BACKGROUNDS[0], BACKGROUNDS[-1])
    figure = Figure(figsize=(11, 6), layout="constrained")
    call = {"guidance_scale": _PICTURE_SCALE, "num_inference_steps": steps}
    lines = []
    for word in words:
        # As many of every digit, in order, where there are enough.
        shown = test[test.labels[:, 0] == BACKGROUNDS.index(word)]
        mixed = shown[torch.randperm(len(shown), generator=torch.Generator().manual_seed(seed))]
        number = torch.arange(_COLUMNS) % len(SHADED_DIGITS.attributes["digit"])
        rows = [torch.nonzero(mixed.labels[:, 1] == digit).flatten() for digit in number.tolist()]
        real = mixed[torch.stack([found[place // 10 % len(found)] for place, found in enumerate(rows)])]
        members = starts(encoded(pipe.vae, real.images))
        drawn = {name: draw(pipe, real.labels, None, members[name], seed, **call) for name in (WHITE, OMS, MATCHED)}
        lines += [(f"{word}: {name}", images) for name, images in drawn.items()]
        lines.append((f"{word}: real images", real.images / 2 + 0.5))
    for axes, (name, images) in zip(figure.subplots(len(lines), 1), lines, strict=True):
        # In grey, or the brightest images run into the page.
        framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.5)
        axes.imshow(torch.cat(list(framed[:, 0]), dim=1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{name}, mean brightness {float(images.mean()):.2f}", fontsize=9, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; exit code 1 if an acceptance bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="of each background and start; default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM; default: %(default)s")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0], help="of guidance; default: 1 2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    folder: Path = output_folder(given.output_dir)
    torch.set_num_threads(1)
    pipe = load_digits_pipeline(MODULES[MODULE])
    _, test = SHADED_DIGITS.load()
    runs = [run(pipe, test, seed, given.images, given.steps, given.scales) for seed in given.seeds]
    header, rows = table(runs)
    print_table(f"shaded digits, {given.images} images, {given.steps} steps", header, rows)
    checks = acceptance(runs)
    expected = theory(pipe, test, given.steps)
    lines = [
        markdown(header, rows), "Brightness: the mean of the pixels, 0 is black and 1 white.\n",
        f"An exact model of normal channel means would keep {expected['white_mean']:.2f} of the mean from white noise "
        f"(counted from mid grey), and {expected['oms_spread']:.2f} of the spread with One More Step.\n",
        judge(checks),
    ]  # fmt: skip
    content = {
        "runs": runs, "acceptance": [list(check) for check in checks], "theory": expected,
        "images": given.images, "steps": given.steps,
    }  # fmt: skip
    write_json(folder / "one_more_step_digits.json", {**circumstances(given.seeds), **content})
    (folder / "one_more_step_digits.md").write_text("\n".join(lines), encoding="utf-8")
    picture(pipe, test, given.seeds[0], given.steps, folder / "one_more_step_digits.png")
    return int(not all(passed for _, passed in checks))


if __name__ == "__main__":
    raise SystemExit(main())
