"""Flat images of three prompts, dark, grey and bright, and the denoiser that is exactly right about them.

The denoiser computes the posterior mean in closed form, so that nothing that is seen in its samples comes from
training: where they start is the only thing that can be wrong. The world is synthetic, of 4-channel latents:
x0 = b + 0.1 texture, with b | prompt ~ N(mean of the prompt, 0.2^2) and a white texture of mean 0. If asked for, light
falls from one side too: + g ramp, with g ~ N(0, slope^2) and a horizontal ramp of mean square 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import StableDiffusionPipeline

    from hfnoise.latents.hf_time_free_unet import TimeFreeUNet2DConditionModel

PROMPTS = ("dark", "grey", "bright")
MEANS = (-0.7, 0.0, 0.7)
SHARES = (0.45, 0.1, 0.45)
SPREAD = 0.2
TEXTURE = 0.1
CHANNELS = 4
# To train a module of One More Step on: it knows no size, so small latents do, and larger ones are drawn.
ROWS, TEST_ROWS, TRAIN_SIZE = 4096, 256, 16
# The noise schedule of Stable Diffusion.
SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def draw_prompts(count: int, generator: torch.Generator) -> Tensor:
    """Return prompts at random, as numbers of [`PROMPTS`], of shape `(count,)`.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.brightness import draw_prompts
        >>> draw_prompts(3, torch.Generator().manual_seed(0)).shape
        torch.Size([3])
    """
    return torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=generator)


def ramp(size: int) -> Tensor:
    """Return a straight line from edge to edge, of mean 0 and mean square 1, of shape `(size,)`, in float32.

    Example:
        >>> from hfnoise.worlds.brightness import ramp
        >>> ramp(2)
        tensor([-1.,  1.])
    """
    line = torch.linspace(-1.0, 1.0, size)
    return line / line.square().mean().sqrt()


def draw_latents(prompts: Tensor, size: int, generator: torch.Generator, slope: float = 0.0) -> Tensor:
    """Return one image of the world for each prompt, of shape `(prompts, 4, size, size)`.

    Args:
        prompts (`torch.Tensor` of shape `(prompts,)`): numbers of [`PROMPTS`].
        size (`int`): of the latents.
        generator (`torch.Generator`): of the draws.
        slope (`float`, defaults to `0.0`): spread of the light from one side.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.brightness import draw_latents
        >>> draw_latents(torch.tensor([2, 2]), 8, torch.Generator().manual_seed(0)).mean() > 0
        tensor(True)
    """
    brightness = torch.tensor(MEANS)[prompts] + SPREAD * torch.randn(len(prompts), generator=generator)
    texture = torch.randn(len(prompts), CHANNELS, size, size, generator=generator)
    texture -= texture.mean((1, 2, 3), keepdim=True)
    latents = brightness[:, None, None, None] + TEXTURE * texture
    if slope:
        latents += slope * torch.randn(len(prompts), 1, 1, 1, generator=generator) * ramp(size)
    return latents


def prompt_states(prompts: Tensor) -> Tensor:
    """Return what the networks read a prompt from: how likely it is each of the three, of shape `(prompts, 1, 3)`.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.brightness import prompt_states
        >>> prompt_states(torch.tensor([2])).tolist()
        [[[0.0, 0.0, 1.0]]]
    """
    return torch.eye(len(PROMPTS))[prompts][:, None]


def empty_states(count: int) -> Tensor:
    """Return those of no prompt at all: any of the three may be meant.

    Example:
        >>> from hfnoise.worlds.brightness import empty_states
        >>> empty_states(2).shape
        torch.Size([2, 1, 3])
    """
    return torch.tensor(SHARES).expand(count, 1, -1).contiguous()


def brightness_rows(count: int, generator: torch.Generator, size: int = TRAIN_SIZE) -> Dataset:
    """Return rows for [`~hfnoise.OneMoreStepTrainer`]: latents with the states of their prompts.

    Args:
        count (`int`): of rows.
        generator (`torch.Generator`): of what is drawn.
        size (`int`, defaults to `16`): of the latents.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.brightness import brightness_rows
        >>> brightness_rows(2, torch.Generator().manual_seed(0), size=8)[0]["latents"].shape
        torch.Size([4, 8, 8])
    """
    from datasets import Array2D, Array3D, Dataset, Features

    prompts = draw_prompts(count, generator)
    latents, states = draw_latents(prompts, size, generator), prompt_states(prompts)
    # Arrays of a known shape are read much faster than lists of lists.
    shapes = {
        "latents": Array3D(tuple(latents.shape[1:]), "float32"),
        "encoder_hidden_states": Array2D(tuple(states.shape[1:]), "float32"),
    }
    columns = {"latents": latents.numpy(), "encoder_hidden_states": states.numpy()}
    return Dataset.from_dict(columns, features=Features(shapes)).with_format("torch")


class BayesUNet(ModelMixin, ConfigMixin):
    """E[x0 | x_t, prompt] of the world in closed form, as a UNet2DConditionModel would put it out.

    Args:
        in_channels (`int`, defaults to `4`), sample_size (`int`, defaults to `32`): of the latents.
        prediction_type (`str`, defaults to `"epsilon"`): or `"v_prediction"`.
        zero_snr (`bool`, defaults to `False`): of a base model that was trained again with zero terminal SNR
            (arXiv 2305.08891), for comparison.
        noise_offset (`float`, defaults to `0.0`): of one that was trained again with offset noise, eps + o n with one
            n ~ N(0, 1) for each channel, as with `--noise_offset` of diffusers' scripts; for comparison.
        slope (`float`, defaults to `0.0`): of the images, as in [`draw_latents`].
        time_cond_proj_dim (*optional*): diffusers asks for it.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.brightness import BayesUNet, prompt_states
        >>> BayesUNet()(torch.zeros(1, 4, 8, 8), 999, prompt_states(torch.tensor([0]))).sample.shape
        torch.Size([1, 4, 8, 8])
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = CHANNELS,
        sample_size: int = 32,
        prediction_type: str = "epsilon",
        zero_snr: bool = False,
        noise_offset: float = 0.0,
        time_cond_proj_dim: int | None = None,
        slope: float = 0.0,
    ) -> None:
        super().__init__()
        powers = DDIMScheduler(**SCHEDULE, rescale_betas_zero_snr=zero_snr).alphas_cumprod
        self.register_buffer("alphas_cumprod", powers.double(), persistent=False)
        # diffusers takes dtype and device from a parameter.
        self.placeholder = torch.nn.Parameter(torch.zeros(1))

    def forward(
        self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True, **_: Any
    ) -> Any:
        """Return the prediction; arguments as of UNet2DConditionModel."""
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        power = float(self.alphas_cumprod[round(float(timestep))])
        a, s = math.sqrt(power), math.sqrt(1.0 - power)
        numbers = sample[0].numel()
        # How much larger the variance of a channel's mean noise is than that of white noise.
        excess = 1.0 + self.config.noise_offset**2 * numbers / sample.shape[1]
        # float64: a likelihood ratio of the mean of thousands of numbers.
        observed = sample.mean((1, 2, 3), dtype=torch.float64)[:, None]
        means = torch.tensor(MEANS, dtype=torch.float64)
        variance = a * a * SPREAD**2 + excess * s * s / numbers
        likelihood = encoder_hidden_states[:, 0].double().log() - 0.5 * (observed - a * means) ** 2 / variance
        by_prompt = means + a * SPREAD**2 / variance * (observed - a * means)
        brightness = (torch.softmax(likelihood, 1) * by_prompt).sum(1, keepdim=True)
        gain = a * TEXTURE**2 / (a * a * TEXTURE**2 + s * s)
        shift = (brightness - gain * observed).to(sample.dtype)[..., None, None]
        x0 = gain * sample + shift
        if excess > 1.0:
            # What the channel means differ by is texture beneath as much noise as the brightness is.
            less = gain - a * TEXTURE**2 / (a * a * TEXTURE**2 + excess * s * s)
            x0 = x0 - less * (sample.mean((2, 3)) - observed.to(sample.dtype))[..., None, None]
        if self.config.slope:
            line = ramp(sample.shape[-1])
            seen = (sample * line).mean((1, 2, 3), dtype=torch.float64)[:, None, None, None]
            # Along the ramp there is what the texture has of it too.
            variance = self.config.slope**2 + TEXTURE**2 / numbers
            slope_gain = a * variance / (a * a * variance + s * s / numbers)
            x0 = x0 + ((slope_gain - gain) * seen).to(sample.dtype) * line
        if self.config.prediction_type == "epsilon":
            output = (sample - a * x0) / s
        else:
            # v = a eps - s x0, with a^2 + s^2 = 1.
            output = (a * sample - x0) / s
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


class ExactMean(torch.nn.Module):
    """The best module that One More Step could have here: -E[x0 | prompt], whatever the noise.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.brightness import ExactMean, prompt_states
        >>> ExactMean()(torch.zeros(1, 4, 8, 8), prompt_states(torch.tensor([2])))[0][0, 0, 0, 0]
        tensor(-0.7000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.means = torch.nn.Parameter(torch.tensor(MEANS), requires_grad=False)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Return minus the mean of each prompt."""
        return (-(encoder_hidden_states[:, 0] @ self.means)[:, None, None, None].expand_as(sample),)


def new_brightness_pipeline(
    scheduler: Any = None,
    size: int = 32,
    prediction_type: str = "epsilon",
    zero_snr: bool = False,
    noise_offset: float = 0.0,
    slope: float = 0.0,
) -> StableDiffusionPipeline:
    """Return a stock Stable Diffusion pipeline around the exact denoiser; it has neither VAE nor text encoder.

    Args:
        scheduler (*optional*): with the world's [`SCHEDULE`]; DDIM as Stable Diffusion 1.5 has it by default.
        size (`int`, defaults to `32`): of the latents; the call takes 8 times that for height and width.
        prediction_type, zero_snr, noise_offset, slope: of [`BayesUNet`].

    Example:
        >>> from hfnoise.worlds.brightness import new_brightness_pipeline
        >>> type(new_brightness_pipeline()).__name__
        'StableDiffusionPipeline'
    """
    from diffusers import StableDiffusionPipeline

    if scheduler is None:
        options = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        scheduler = DDIMScheduler(**SCHEDULE, **options, prediction_type=prediction_type)
    unet = BayesUNet(
        sample_size=size, prediction_type=prediction_type, zero_snr=zero_snr, noise_offset=noise_offset, slope=slope
    )
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def new_brightness_module(seed: int = 0) -> TimeFreeUNet2DConditionModel:
    """Return an untrained module of One More Step for the world, of 58 thousand parameters.

    Example:
        >>> from hfnoise.worlds.brightness import new_brightness_module
        >>> new_brightness_module().config.cross_attention_dim
        3
    """
    from hfnoise.latents.hf_time_free_unet import TimeFreeUNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TimeFreeUNet2DConditionModel(
            in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4, attention_head_dim=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=len(PROMPTS),
        )  # fmt: skip


def brightness_error(latents: Tensor, reference: Tensor, prompts: Tensor) -> float:
    """Return the Wasserstein-1 distance of the brightness of images from that of real ones, mean over the prompts.

    Args:
        latents, reference (`torch.Tensor` of shape `(samples, ...)`): for the same prompts.
        prompts (`torch.Tensor` of shape `(samples,)`): numbers of [`PROMPTS`].

    Example:
        >>> import torch
        >>> from hfnoise.worlds.brightness import brightness_error
        >>> brightness_error(torch.zeros(2, 4, 1, 1), torch.ones(2, 4, 1, 1), torch.tensor([0, 1]))
        1.0
    """
    drawn, real = (images.double().flatten(1).mean(1) for images in (latents, reference))
    # Of equally many numbers it is the mean distance of the sorted ones; prompts weigh as often as they are there.
    distances = [
        (drawn[prompts == prompt].sort().values - real[prompts == prompt].sort().values).abs().sum()
        for prompt in prompts.unique()
    ]
    return float(sum(distances)) / len(prompts)


def theory(power: float, size: int) -> dict[str, float]:
    """Return what an exact solver gives: factor of the mean and spread within a prompt, from white noise and OMS.

    Args:
        power (`float`): alpha_bar at the first timestep.
        size (`int`): of the latents.

    Returns:
        `white_mean` and `white_spread`, `oms_mean` and `oms_spread`; the truth is 1 and [`SPREAD`].

    Example:
        >>> from hfnoise.worlds.brightness import theory
        >>> {name: round(number, 3) for name, number in theory(0.00578, 32).items()}
        {'white_mean': 0.302, 'white_spread': 0.144, 'oms_mean': 1.0, 'oms_spread': 0.143}
    """
    signal = power * CHANNELS * size * size * SPREAD**2
    rho_squared = signal / (signal + 1.0 - power)
    return {
        "white_mean": 1.0 - math.sqrt(rho_squared),
        "white_spread": SPREAD / math.sqrt(signal + 1.0 - power),
        "oms_mean": 1.0,
        "oms_spread": SPREAD * math.sqrt(1.0 - rho_squared),
    }
