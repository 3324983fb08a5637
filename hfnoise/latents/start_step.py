"""One More Step: from white noise to where a diffusion model was trained to start."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

COMPATS = (None, "official")
ESTIMATE_TYPES = ("v", "sample")
GUIDANCE_MODES = ("plain", "normalized")


def one_more_step(
    v: Tensor,
    noise: Tensor,
    alpha_bar: float | Tensor,
    eta: float = 0.0,
    compat: str | None = None,
    *,
    fresh_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the start state sqrt(alpha_bar) x0_hat + sqrt(1 - alpha_bar) eps, with x0_hat = -v.

    One More Step (arXiv 2311.15744): at a signal-to-noise ratio of 0 the velocity is v = -x0, so a network that is
    given white noise and the prompt says what the mean of the images is; the base model starts from that mean with
    noise on it, as in its training, and not from noise alone. With eta, eps = sqrt(1 - eta^2) noise + eta z.

    Departure: the official code multiplies the noise by its variance, 1 - alpha_bar; `compat="official"` does so too.

    Args:
        v (`torch.Tensor` of shape `(batch, channels, height, width)`): what the network puts out, guided if need be.
        noise (`torch.Tensor` of the shape of `v`): of unit variance; what the network was given, so that the
            composition of the image without this step is kept. Where all noise is new (`eta=1`, and `"official"`) it
            is taken for z, unless `fresh_noise` or `generator` is given.
        alpha_bar (`float` or `torch.Tensor`): signal power in [0, 1] at the first timestep of the scheduler, which
            need not be the last one of training; or one a sample.
        eta (`float`, defaults to `0.0`): in [0, 1], share of z; 0 or 1 in `compat="official"`, where all is z.
        compat (`str`, *optional*): `"official"` for the arithmetic of the released code.
        fresh_noise (`torch.Tensor` of the shape of `v`, *optional*): z; drawn from `generator` by default.
        generator (`torch.Generator`, *optional*): for z.

    Returns:
        `torch.Tensor` in float32, of unit scale: for schedulers in sigmas divide it by sqrt(alpha_bar).

    Raises:
        ValueError: if shapes differ, or a number is out of its range.

    Example:
        >>> import torch
        >>> from hfnoise.latents import one_more_step
        >>> one_more_step(torch.full((1, 1, 1, 1), -0.5), torch.ones(1, 1, 1, 1), alpha_bar=0.64).item()
        1.0
    """
    power = torch.as_tensor(alpha_bar, dtype=torch.float64, device="cpu")
    if power.numel() != 1 and power.numel() != len(v) * (power.shape[0] == len(v)):
        raise ValueError(
            f"alpha_bar must be one number or one a sample, got a tensor of shape {tuple(power.shape)} for "
            f"{len(v)} samples."
        )
    if not bool(((power >= 0) & (power <= 1)).all()):
        raise ValueError(f"alpha_bar must be in [0, 1], got {alpha_bar}: it is the square of the signal's factor.")
    if v.shape != noise.shape:
        raise ValueError(
            f"v is of shape {tuple(v.shape)} and the noise of {tuple(noise.shape)}: they must be the same."
        )
    eta = plain_number(eta)
    check_compat(compat, eta)
    share = 1.0 if compat == "official" else eta
    if share != 1.0 or fresh_noise is not None or generator is not None:
        noise = mixed_noise(noise, share, fresh_noise, generator)
    spread = 1.0 - power if compat == "official" else (1.0 - power).sqrt()
    signal, spread = (
        factor.float().reshape(-1, *[1] * (v.dim() - 1)).to(v.device) for factor in (power.sqrt(), spread)
    )
    return spread * noise.float() - signal * v.float()


def mixed_noise(
    noise: Tensor, eta: float, fresh_noise: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Return sqrt(1 - eta^2) noise + eta z, of the variance of both; `noise` itself at `eta=0`.

    Args:
        noise (`torch.Tensor`): of unit variance.
        eta (`float`): in [0, 1].
        fresh_noise (`torch.Tensor` of the shape of `noise`, *optional*): z; drawn from `generator` by default.
        generator (`torch.Generator`, *optional*): for z.

    Raises:
        ValueError: if eta is out of its range, or z of another shape.

    Example:
        >>> import torch
        >>> from hfnoise.latents import mixed_noise
        >>> mixed_noise(torch.ones(2), 1.0, torch.zeros(2))
        tensor([0., 0.])
    """
    eta = plain_number(eta)
    check_eta(eta)
    if eta == 0.0:
        return noise
    if fresh_noise is None:
        device = noise.device if generator is None else generator.device
        fresh_noise = torch.randn(noise.shape, generator=generator, device=device).to(noise.device)
    if fresh_noise.shape != noise.shape:
        raise ValueError(
            f"fresh_noise is of shape {tuple(fresh_noise.shape)} and the noise of {tuple(noise.shape)}: they must be "
            "the same."
        )
    return math.sqrt(1.0 - eta * eta) * noise.float() + eta * fresh_noise.float()


def check_eta(eta: float) -> None:
    """Raise ValueError unless eta is in [0, 1].

    Example:
        >>> from hfnoise.latents.start_step import check_eta
        >>> check_eta(0.5)
    """
    if not isinstance(plain_number(eta), Real) or not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in [0, 1], got {eta!r}: 0 keeps the noise, 1 replaces it.")


def check_compat(compat: str | None, eta: float) -> None:
    """Raise ValueError if there is no such arithmetic, or eta has no part in it.

    Example:
        >>> from hfnoise.latents.start_step import check_compat
        >>> check_compat("official", eta=1.0)
    """
    check_eta(eta)
    if compat not in COMPATS:
        raise ValueError(f"compat must be one of {COMPATS}, got {compat!r}.")
    if compat == "official" and eta not in (0.0, 1.0):
        raise ValueError(f"compat='official' replaces all of the noise; eta={eta} has no part in it.")


def guided_estimate(uncond: Tensor, cond: Tensor, guidance_scale: float, mode: str = "plain") -> Tensor:
    """Return the network's output under classifier-free guidance, in float32.

    `"plain"` is uncond + g (cond - uncond), of One More Step. Since the best output is a mean of images, g above 1
    enlarges its difference from the mean without prompt: a colour and brightness knob, not one of quality.
    `"normalized"` divides that by g, of SingDiffusion (arXiv 2403.08381).

    Args:
        uncond, cond (`torch.Tensor` of the same shape): outputs for the negative prompt and for the prompt.
        guidance_scale (`float`): g, at least 0, and above 0 where it divides.
        mode (`str`, defaults to `"plain"`): or `"normalized"`.

    Raises:
        ValueError: if the mode is unknown or g too small.

    Example:
        >>> import torch
        >>> from hfnoise.latents import guided_estimate
        >>> [guided_estimate(torch.zeros(1), torch.ones(1), 4.0, mode).item() for mode in ("plain", "normalized")]
        [4.0, 1.0]
    """
    guidance_scale = plain_number(guidance_scale)
    check_guidance(guidance_scale, mode)
    guided = uncond.float() + guidance_scale * (cond.float() - uncond.float())
    return guided / guidance_scale if mode == "normalized" else guided


def check_guidance(guidance_scale: float, mode: str) -> None:
    """Raise ValueError if a guidance of the start cannot be computed.

    Example:
        >>> from hfnoise.latents.start_step import check_guidance
        >>> check_guidance(1.5, "plain")
    """
    if mode not in GUIDANCE_MODES:
        raise ValueError(f"guidance_mode must be one of {GUIDANCE_MODES}, got {mode!r}.")
    in_range = isinstance(plain_number(guidance_scale), Real) and 0.0 <= guidance_scale < math.inf
    if not in_range or (mode == "normalized" and guidance_scale == 0.0):
        least = "above 0, since it divides" if mode == "normalized" else "at least 0"
        raise ValueError(f"guidance_scale of the start must be {least}, got {guidance_scale!r}.")


def estimated_x0(output: Tensor, prediction_type: str = "v") -> Tensor:
    """Return x0_hat in float32: minus a velocity at signal-to-noise ratio 0, or the sample itself.

    Args:
        output (`torch.Tensor`): of the network.
        prediction_type (`str`, defaults to `"v"`): of One More Step; `"sample"` of SingDiffusion.

    Raises:
        ValueError: if the type is unknown.

    Example:
        >>> import torch
        >>> from hfnoise.latents import estimated_x0
        >>> estimated_x0(torch.tensor(2.0)).item()
        -2.0
    """
    if prediction_type not in ESTIMATE_TYPES:
        raise ValueError(f"prediction_type of the module must be one of {ESTIMATE_TYPES}, got {prediction_type!r}.")
    return -output.float() if prediction_type == "v" else output.float()


def plain_number(value: Any) -> Any:
    """Return the number in a tensor or array without dimensions; anything else as it is.

    Example:
        >>> import torch
        >>> from hfnoise.latents.start_step import plain_number
        >>> plain_number(torch.tensor(0.5))
        0.5
    """
    return value.item() if getattr(value, "ndim", None) == 0 else value
