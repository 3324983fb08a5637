"""Re-denoising and noise-level guidance against the golden vectors (tests/vectors/golden_noise)."""

import math

import numpy
import pytest
import torch
from diffusers import DDIMScheduler

from hfnoise.guidance import DenoisingPoint
from hfnoise.latents import (
    Redenoising,
    ddim_step,
    mixed_noise,
    noise_level_step,
    noised_condition,
    pack_latents,
    start_form,
    start_prediction,
    unit_norm,
    unpack_latents,
)
from tests.conftest import VECTORS


def arrays(name):
    loaded = numpy.load(VECTORS / "golden_noise" / f"dev_{name}.npz")
    return {key: torch.as_tensor(loaded[key]) for key in loaded.files}


def powers():
    """Return `alphas_cumprod` of the vectors."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()


def point(timestep, kind="epsilon"):
    power = float(powers()[timestep])
    return DenoisingPoint(kind, power**0.5, (1 - power) ** 0.5)


def stand_in(x, context, t, gain=None):
    """Return what the vectors have in the place of a UNet."""
    shift = context[:, :, None, None] * (1 + t / 1000)
    return 0.9 * x + 0.3 * torch.tanh(x.flip(-1)) + (shift if gain is None else shift * gain(x))


def test_redenoising():
    case = arrays("redenoise")
    t0, t1 = case["timesteps01"].tolist()
    x, context = case["x_T"], case["context"]
    step = Redenoising.between(point(t0), point(t1))
    moved = step.denoised(x, case["eps_denoise"])
    assert (moved - case["x_Tm1"]).abs().max() <= 1e-5
    # The prediction on the way back is of t0 too.
    back = stand_in(moved, case["cfg_invert"].float() * context, t0)
    assert (back - case["eps_invert"]).abs().max() <= 1e-5
    assert (step.refined(x, case["eps_denoise"], back) - case["golden_exact"]).abs().max() <= 1e-5
    both = ddim_step(moved, back, float(powers()[t1]), float(powers()[t0]))
    assert (both - case["golden_exact"]).abs().max() <= 1e-5
    # The official code goes up from where the third step would end.
    t2 = 2 * t1 - t0
    official = ddim_step(case["x_Tm1"], case["eps_invert"], float(powers()[t2]), float(powers()[t1]))
    assert (official - case["golden_upstream"]).abs().max() <= 1e-5
    assert (official - case["golden_exact"]).abs().max() > 1e-2


@pytest.mark.parametrize(("count", "size"), [(4, 0.588), (10, 0.385), (20, 0.238), (30, 0.168), (50, 0.110)])
def test_step_sizes_of_the_paper_schedule(count, size):
    """Leading spacing of N steps."""
    stride = 1000 // count
    first = 1 + stride * (count - 1)
    assert Redenoising.between(point(first), point(first - stride)).step_size == pytest.approx(size, abs=6e-4)


def test_every_form_is_one_step_and_its_inverse():
    """Down by the scheduler's arithmetic and up again, for each kind of model."""
    generator = torch.Generator().manual_seed(0)
    x, down, back = torch.randn(3, 2, 4, 4, 4, generator=generator, dtype=torch.float64)
    # Flow matching: x + (s1 - s0) v.
    start, after = (DenoisingPoint("flow_prediction", 1 - s, s) for s in (1.0, 0.9))
    step = Redenoising.between(start, after)
    moved = x + (0.9 - 1.0) * down
    torch.testing.assert_close(step.denoised(x, down), moved)
    torch.testing.assert_close(step.refined(x, down, back), moved + (1.0 - 0.9) * back)
    # Zero terminal SNR: x is the noise of the first step, and the image of the second gives its own.
    start, after = DenoisingPoint("v_prediction", 0.0, 1.0), DenoisingPoint("v_prediction", 0.6, 0.8)
    step = Redenoising.between(start, after)
    x0, x0_back = (start.denoised(x, output) for output in (down, back))
    moved = 0.6 * x0 + 0.8 * x
    directions = [start_prediction(start, x, output) for output in (down, back)]
    torch.testing.assert_close(step.denoised(x, directions[0]), moved)
    torch.testing.assert_close(step.refined(x, *directions), (moved - 0.6 * x0_back) / 0.8)


def test_noise_of_every_prediction_type():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 4, 4, 4, generator=generator)
    x = 0.6 * x0 + 0.8 * eps
    outputs = {"epsilon": eps, "v_prediction": 0.6 * eps - 0.8 * x0, "sample": x0}
    for kind, output in outputs.items():
        assert start_form(DenoisingPoint(kind, 0.6, 0.8)) == "noise"
        torch.testing.assert_close(start_prediction(DenoisingPoint(kind, 0.6, 0.8), x, output), eps)
    for kind, output in (("v_prediction", -x0), ("sample", x0)):
        assert start_form(DenoisingPoint(kind, 2**-12, 1.0)) == "image"
        torch.testing.assert_close(start_prediction(DenoisingPoint(kind, 0.0, 1.0), eps, output), -x0)


def official_directions(case):
    """Yield what the official code computes, with the UNet's input cast to 16 bits as there."""
    alpha, sigma = float(case["alpha_t"]), float(case["sigma_t"])

    def direction(x):
        seen = x.half().float()
        v_cond, v_uncond = (
            stand_in(seen, context, 999, lambda n: 1 + 0.5 * n.sin())
            for context in (case["context"], torch.zeros_like(case["context"]))
        )
        where = DenoisingPoint("v_prediction", alpha, sigma)
        eps_cond, eps_uncond = (start_prediction(where, x, v) for v in (v_cond, v_uncond))
        return 3 * eps_cond - 2 * eps_uncond if case["guidance_formula"] else eps_cond - eps_uncond

    return direction


@pytest.mark.parametrize("name", ["nlg", "nlg_before_set_timesteps"])
def test_noise_level_guidance(name):
    case = arrays(name)
    limit = None if case["clip_threshold"].isnan() else float(case["clip_threshold"])
    direction, x = official_directions(case), case["latents"]
    for magnitudes in case["step_magnitudes"]:
        d = direction(x)
        assert d.flatten(1).norm(dim=1).tolist() == pytest.approx(magnitudes.tolist(), rel=5e-3)
        x = noise_level_step(x, d, max_norm=limit, normalize=bool(case["normalize"]))
    # The official code casts to half.
    assert (x - case["refined"]).abs().max() <= 5e-3
    assert not torch.equal(x, case["latents"])


def test_fresh_noise_and_boundary():
    x, d, z = torch.randn(3, 2, 1, 50, 50, generator=torch.Generator().manual_seed(0))
    plain = noise_level_step(x, d, 0.5, normalize=False)
    torch.testing.assert_close(plain, x - 0.5 * d)
    noisy = noise_level_step(x, d, 0.5, fresh_noise=z, noise_variance=0.04, normalize=False)
    torch.testing.assert_close(noisy - plain, 0.2 * z)
    assert noise_level_step(x, d, boundary=1.0, normalize=False).abs().max() == 1.0
    unit = noise_level_step(x, d, 2.0)
    assert unit.flatten(1).norm(dim=1).tolist() == pytest.approx([50.0, 50.0], rel=1e-5)
    torch.testing.assert_close(unit_norm(x, like=2 * x), 2 * x)
    # Limits are a sample's own.
    together = noise_level_step(x, d, max_norm=3.0)
    assert torch.equal(together[1:], noise_level_step(x[1:], d[1:], max_norm=3.0))


def test_mixing_keeps_unit_variance():
    x, z = torch.randn(2, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    for strength in (0.0, 0.3, 1.0):
        # Standard deviation of a standard deviation of 40 000 numbers: 0.0035.
        assert mixed_noise(x, strength, z).std().item() == pytest.approx(1.0, abs=0.015)
    assert mixed_noise(x, 0.0, z) is x and torch.equal(mixed_noise(x, 1.0, z), z)


def test_condition_noise():
    states = 3 * torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)) + 1
    noise = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    noised = noised_condition(states, noise, 0.6)
    assert noised_condition(states, noise, 0.0) is states
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(noised, (1, 2)), statistic(states, (1, 2)))
    similarity = torch.cosine_similarity((states - 1).flatten(1), (noised - 1).flatten(1))
    assert similarity.tolist() == pytest.approx([0.8, 0.8], abs=0.1)
    assert torch.equal(noised[1:], noised_condition(states[1:], noise[1:], 0.6))
    assert noised_condition(states.bfloat16(), noise, 0.6).dtype == torch.bfloat16


def test_packing_is_that_of_flux():
    from diffusers import FluxPipeline

    latents = torch.arange(2 * 4 * 6 * 4.0).reshape(2, 4, 6, 4)
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 6, 4))
    assert torch.equal(unpack_latents(packed, 6, 4), latents)


X = torch.zeros(1, 2, 4, 4)
EPSILON = DenoisingPoint("epsilon", 0.6, 0.8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Redenoising(EPSILON, -0.1), r"must be in \[0, 0.8\], got -0.1"),
        (lambda: Redenoising(EPSILON, 0.9), "Take a smaller strength, or more num_steps"),
        (lambda: Redenoising(DenoisingPoint("v_prediction", 0.0, 1.0), math.inf), "got inf"),
        (lambda: Redenoising(DenoisingPoint("epsilon", 0.0, 1.0), 0.1), "says nothing of the image"),
        (lambda: start_prediction(EPSILON, X, X[:, :1]), r"of \(1, 1, 4, 4\)"),
        (lambda: ddim_step(X, X, 0.0, 0.5), r"must be in \(0, 1\], got 0.0"),
        (lambda: noise_level_step(X, X[:, :1]), r"direction of \(1, 1, 4, 4\)"),
        (lambda: noise_level_step(X, X, 0.0), "step_size must be above 0"),
        (lambda: noise_level_step(X, X, max_norm=0.0), "above 0, or None"),
        (lambda: noise_level_step(X, X, noise_variance=-1.0), "noise_variance must be at least 0"),
        (lambda: noise_level_step(X, X, noise_variance=0.1), "no fresh_noise to add"),
        (lambda: noised_condition(X, X, 1.5), r"strength must be in \[0, 1\], got 1.5"),
        (lambda: noised_condition(X, X, 0.5, rescale=-1.0), "rescale must be in"),
        (lambda: noised_condition(X, X[:, :1], 0.5), "noise of"),
        (lambda: pack_latents(X[..., :3]), r"even, even\), got \(1, 2, 4, 3\)"),
        (lambda: unpack_latents(X, 4, 4), "no latents of 4 x 4"),
        (lambda: unpack_latents(torch.zeros(1, 4, 8), 4, 6), "no latents of 4 x 6"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
