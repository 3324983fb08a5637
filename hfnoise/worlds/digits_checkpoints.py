"""The shipped checkpoints of the worlds of digits, by name: the pipeline, its verifier and its judge."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from hfnoise.worlds.coloured_digits import COLOURED_DIGITS
from hfnoise.worlds.digit_world import DigitWorld
from hfnoise.worlds.digits import DIGITS
from hfnoise.worlds.digits_judges import KINDS, DigitClassifier
from hfnoise.worlds.digits_recipe import WEAK_STEPS
from hfnoise.worlds.shaded_digits import SHADED_DIGITS

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

WORLDS = {world.name: world for world in (DIGITS, COLOURED_DIGITS, SHADED_DIGITS)}
# The name of a folder below model_cards -> its world.
CHECKPOINTS: dict[str, DigitWorld] = {
    "digits-sd": DIGITS,
    "digits-sd-weak": DIGITS,
    "coloured-digits-sd": COLOURED_DIGITS,
    "shaded-digits-sd": SHADED_DIGITS,
}
# Modules of One More Step beside them -> the checkpoint that each is for.
MODULES = {"shaded-digits-oms": "shaded-digits-sd"}


def checkpoint_path(name: str | Path) -> str:
    """Return the folder of a checkpoint, for `from_pretrained`.

    Args:
        name (`str` or `Path`): one of `CHECKPOINTS`, or a folder that `hfnoise.worlds.digits_model` wrote.

    Raises:
        ValueError: if it is neither.
        FileNotFoundError: if the weights of a shipped checkpoint are missing.

    Example:
        >>> from pathlib import Path
        >>> from hfnoise.worlds.digits_checkpoints import checkpoint_path
        >>> Path(checkpoint_path("digits-sd-weak")).name
        'digits-sd-weak'
    """
    if isinstance(name, str) and name in CHECKPOINTS:
        folder = Path(str(files("hfnoise.model_cards"))) / name
        if not (folder / "model_index.json").is_file():
            steps = f" --steps {WEAK_STEPS}" if name == "digits-sd-weak" else ""
            raise FileNotFoundError(
                f"no weights in {folder}. Train them in a few minutes with: python -m hfnoise.worlds.digits_model "
                f"--world {CHECKPOINTS[name].name} --output_dir {folder}{steps}"
            )
        return str(folder)
    if not (Path(name) / "model_index.json").is_file():
        raise ValueError(f"{str(name)!r} is no checkpoint: give one of {', '.join(CHECKPOINTS)}, or a trained folder.")
    return str(name)


def one_more_step_path(name: str = "shaded-digits-oms") -> str:
    """Return the folder of a shipped module of One More Step, for `OneMoreStep.from_pretrained`.

    Args:
        name (`str`, defaults to `"shaded-digits-oms"`): one of `MODULES`, whose values are the checkpoints that they
            are for.

    Raises:
        ValueError: for another name.

    Example:
        >>> from pathlib import Path
        >>> from hfnoise.worlds.digits_checkpoints import one_more_step_path
        >>> Path(one_more_step_path()).name
        'shaded-digits-oms'
    """
    if name not in MODULES:
        raise ValueError(f"{name!r} is no shipped module of One More Step: give one of {', '.join(MODULES)}.")
    return str(Path(str(files("hfnoise.model_cards"))) / name)


def load_digits_pipeline(name: str | Path = "digits-sd") -> StableDiffusionPipeline:
    """Return a pipeline of stock classes that draws digits, without a progress bar.

    Args:
        name (`str` or `Path`, defaults to `"digits-sd"`): `"digits-sd"`, `"digits-sd-weak"` (the same model after a
            third of the training), `"coloured-digits-sd"`, `"shaded-digits-sd"`, or a folder.

    Raises:
        ValueError: for another name.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits_checkpoints import load_digits_pipeline
        >>> pipe = load_digits_pipeline()
        >>> noise = torch.Generator().manual_seed(0)
        >>> pipe("the digit seven", num_inference_steps=4, generator=noise, output_type="pt").images.shape
        torch.Size([1, 1, 16, 16])
    """
    folder = checkpoint_path(name)  # a wrong name fails before the import, which takes seconds
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_digit_classifier(kind: str, name: str | Path = "digits-sd") -> DigitClassifier:
    """Return the verifier or the judge of a checkpoint: trained on disjoint halves of the images.

    A method that looks at scores, a search for instance, is given the verifier; the judge says how good it is.

    Args:
        kind (`str`): `"verifier"` or `"judge"`.
        name (`str` or `Path`, defaults to `"digits-sd"`): see [`load_digits_pipeline`].

    Raises:
        ValueError: for another kind or name.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits_checkpoints import load_digit_classifier
        >>> load_digit_classifier("judge").predict(-torch.ones(2, 1, 16, 16)).shape
        torch.Size([2, 1])
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    return DigitClassifier.from_pretrained(Path(checkpoint_path(name)) / kind)
