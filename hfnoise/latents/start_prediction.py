"""What a model says of pure noise, in the form in which a change of the noise is linear in it."""

from __future__ import annotations

from torch import Tensor

from hfnoise.guidance import DenoisingPoint
from hfnoise.guidance.tensor_math import widened

# Signal over noise below which the noise in a prediction says nothing of the image (zero terminal SNR).
LEAST_SIGNAL = 1e-3
FORMS = ("noise", "velocity", "image")


def start_form(point: DenoisingPoint) -> str:
    """Return the form of predictions at the start: `"noise"`, `"velocity"` (flow matching) or `"image"`.

    Where the schedule ends in noise alone all predictions of the noise are the noise itself, so that only those of the
    image differ.

    Args:
        point ([`hfnoise.guidance.DenoisingPoint`]): of the first step.

    Raises:
        ValueError: if the model predicts noise, at a signal-to-noise ratio of 0.

    Example:
        >>> from hfnoise.guidance import DenoisingPoint
        >>> from hfnoise.latents import start_form
        >>> start_form(DenoisingPoint("v_prediction", 0.07, 0.998)), start_form(DenoisingPoint("v_prediction", 0, 1))
        ('noise', 'image')
    """
    if point.prediction_type == "flow_prediction":
        return "velocity"
    if point.alpha > LEAST_SIGNAL * point.sigma:
        return "noise"
    if point.prediction_type == "epsilon":
        raise ValueError(
            "the run starts at a signal-to-noise ratio of 0, where predicted noise says nothing of the image. Use a "
            " scheduler without rescale_betas_zero_snr, or a model with v_prediction."
        )
    return "image"


def start_prediction(point: DenoisingPoint, noise: Tensor, output: Tensor) -> Tensor:
    """Return what a model predicts of noise, in the form of [`start_form`], in float32.

    All forms point away from the image: the noise eps, the velocity v = eps - x0, or -x0. With v_prediction
    eps = alpha v + sigma x.

    Args:
        point ([`hfnoise.guidance.DenoisingPoint`]): of the first step.
        noise (`torch.Tensor` of shape `(batch, ...)`): what the model was given, of unit variance.
        output (`torch.Tensor` of that shape): what it put out.

    Raises:
        ValueError: if shapes differ, or as in [`start_form`].

    Example:
        >>> import torch
        >>> from hfnoise.guidance import DenoisingPoint
        >>> from hfnoise.latents import start_prediction
        >>> start_prediction(DenoisingPoint("v_prediction", 0.6, 0.8), torch.ones(1, 1), torch.ones(1, 1))
        tensor([[1.4000]])
    """
    if noise.shape != output.shape:
        raise ValueError(
            f"the noise is of shape {tuple(noise.shape)} and the prediction of {tuple(output.shape)}: they must "
            "be the same."
        )
    form, x, output = start_form(point), widened(noise), widened(output)
    if form == "velocity" or point.prediction_type == "epsilon":
        return output
    if form == "image":
        return -point.denoised(x, output)
    if point.prediction_type == "v_prediction":
        return point.alpha * output + point.sigma * x
    return (x - point.alpha * output) / point.sigma
