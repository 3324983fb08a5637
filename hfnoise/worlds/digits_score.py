"""How good images of digits are: right by verifier and judge, near to real ones, and different from each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hfnoise.worlds.digits_checkpoints import checkpoint_path, load_digit_classifier
from hfnoise.worlds.digits_judges import DigitClassifier, accuracy

_REFERENCE_FILE = "judge/reference.safetensors"


@dataclass(frozen=True)
class DigitScores:
    """What [`score_digit_images`] returns.

    Args:
        verifier_accuracy, judge_accuracy (`float`): share of the images that show everything that was asked for.
        attribute_accuracy (`tuple[float, ...]`): the judge's for each attribute alone.
        frechet_distance (`float`): between the judge's features of the images and of test images, at least 0.
        diversity (`float`): mean distance of the judge's features of two images with the same labels; nan if no two
            have the same.
    """

    verifier_accuracy: float
    judge_accuracy: float
    attribute_accuracy: tuple[float, ...]
    frechet_distance: float
    diversity: float


def score_digit_images(
    images: torch.Tensor,
    labels: torch.Tensor | Sequence[int],
    name: str | Path = "digits-sd",
    reference: str = "all",
) -> DigitScores:
    """Return how good images are. The real images are not needed: the checkpoint holds the moments of their features.

    The Fréchet distance is that of Heusel et al. 2017 (arXiv 1706.08500, equation 6) on the 64 features of the judge
    in the place of those of Inception. Its size depends on the judge, so only figures of one checkpoint's judge can be
    compared, and it falls with the number of images: compare equal numbers.

    Args:
        images (`torch.Tensor` of shape `(count, channels, 16, 16)`): in [0, 1], as pipelines return them with
            `output_type="pt"`; at least 2.
        labels (`torch.Tensor` of shape `(count,)` or `(count, attributes)`): what was asked for.
        name (`str` or `Path`, defaults to `"digits-sd"`): the checkpoint whose verifier and judge are asked. Weak and
            good checkpoint have the same two.
        reference (`str`, defaults to `"all"`): the test images that are the other side of the Fréchet distance:
            `"all"`, or those of the `"held_out"` combinations of the coloured digits.

    Raises:
        ValueError: if images and labels do not belong together, images are not in [0, 1], or the checkpoint has no
            such reference.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits_checkpoints import load_digits_pipeline
        >>> from hfnoise.worlds.digits_score import score_digit_images
        >>> prompts = ["the digit one", "the digit two"]
        >>> noise = torch.Generator().manual_seed(0)
        >>> arguments = {"num_inference_steps": 5, "generator": noise, "output_type": "pt"}
        >>> score_digit_images(load_digits_pipeline()(prompts, **arguments).images, [1, 2]).judge_accuracy
        1.0
    """
    verifier, judge = (load_digit_classifier(kind, name) for kind in ("verifier", "judge"))
    wanted = torch.as_tensor(labels)
    wanted = wanted[:, None] if wanted.ndim == 1 else wanted
    if images.shape[1:] != (judge.channels, 16, 16) or wanted.shape != (len(images), len(judge.classes)):
        raise ValueError(
            f"needed are images of shape (count, {judge.channels}, 16, 16) and labels of shape (count, "
            f"{len(judge.classes)}), got {tuple(images.shape)} and {tuple(wanted.shape)}."
        )
    if len(images) < 2 or not images.isfinite().all() or images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"needed are at least 2 images in [0, 1] (output_type='pt'), got {len(images)} in "
            f"[{images.min() if len(images) else math.nan:.3g}, {images.max() if len(images) else math.nan:.3g}]."
        )
    inputs = 2 * images.float() - 1
    with torch.no_grad():
        features = judge.body(inputs).double()
    right = judge.predict(inputs) == wanted
    return DigitScores(
        verifier_accuracy=accuracy(verifier, inputs, wanted),
        judge_accuracy=float(right.all(dim=1).float().mean()),
        attribute_accuracy=tuple(right.float().mean(dim=0).tolist()),
        frechet_distance=frechet_distance(moments(features), _load_reference(name, reference)),
        diversity=_diversity(features, wanted),
    )


def save_references(judge: DigitClassifier, images: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Write the moments of the judge's features of test images in [-1, 1] into a checkpoint, by reference."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for reference, shown in images.items():
        with torch.no_grad():
            mean, covariance = moments(judge.body(shown).double())
        tensors |= {f"{reference}.mean": mean, f"{reference}.covariance": covariance}
    save_file(tensors, Path(folder) / _REFERENCE_FILE)


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and covariance of features of shape `(count, size)`."""
    return features.mean(dim=0), torch.cov(features.T)


def frechet_distance(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the Fréchet distance of two normal distributions, given by mean and covariance.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits_score import frechet_distance
        >>> frechet_distance((torch.zeros(2), torch.eye(2)), (torch.ones(2), 4 * torch.eye(2)))
        4.0
    """
    (mean, covariance), (other_mean, other_covariance) = first, second
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)): symmetric, so eigenvalues are real and do not need scipy.
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * cross
    return max(0.0, float(distance))


def _load_reference(name: str | Path, reference: str) -> tuple[torch.Tensor, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(Path(checkpoint_path(name)) / _REFERENCE_FILE)
    known = sorted({key.split(".")[0] for key in tensors})
    if reference not in known:
        raise ValueError(f"reference must be one of {', '.join(known)} for {str(name)!r}, got {reference!r}.")
    return tensors[f"{reference}.mean"], tensors[f"{reference}.covariance"]


def _diversity(features: torch.Tensor, labels: torch.Tensor) -> float:
    _, groups = labels.unique(dim=0, return_inverse=True)
    members = [features[groups == number] for number in range(int(groups.max()) + 1)]
    distances = [torch.pdist(group).mean() for group in members if len(group) > 1]
    return float(torch.stack(distances).mean()) if distances else math.nan
