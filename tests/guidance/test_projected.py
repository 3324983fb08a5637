"""APG and CFG-Zero*: golden vectors in float32 and bfloat16, in x0 space for every kind of output."""

import math

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance

from hfnoise.guidance import (
    DenoisingPoint,
    MomentumState,
    projected_output_update,
    projected_update,
    zero_star_scale,
)


def settings(vectors, name):
    scale, eta, norm_threshold, momentum = (float(number) for number in vectors[name])
    return scale, eta, norm_threshold, None if math.isnan(momentum) else MomentumState(momentum)


@pytest.mark.parametrize("parameters", ["p0", "p1", "p2", "p3"])
@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_the_paper_in_float32_and_bfloat16(guidance_vectors, case, parameters):
    """2e-6 of the float64 formula, as the README of the vectors; 16-bit predictions cost their own rounding only."""
    vectors = guidance_vectors("apg")
    scale, eta, norm_threshold, momentum = settings(vectors, parameters)
    low_momentum, exact_momentum = (settings(vectors, parameters)[3] for _ in range(2))
    for step, paper in enumerate(vectors[f"{case}_{parameters}_paper_f64"]):
        cond, uncond = (torch.as_tensor(vectors[f"{case}_{name}"][step]) for name in ("cond", "uncond"))
        truth = torch.as_tensor(paper)
        update = projected_update(cond.float(), uncond.float(), eta, norm_threshold, momentum)
        assert update.dtype == torch.float32
        guided = cond + (scale - 1) * update
        assert (guided - truth).abs().max() <= 2e-6 * truth.abs().max()
        rounded = cond.bfloat16(), uncond.bfloat16()
        low = projected_update(*rounded, eta, norm_threshold, low_momentum)
        exact = projected_update(*(tensor.double() for tensor in rounded), eta, norm_threshold, exact_momentum)
        assert low.dtype == torch.float32 and exact.dtype == torch.float64
        assert (low - exact).abs().max() <= 2e-6 * exact.abs().max()
        if case == "c0":
            exact = (truth - cond) / (scale - 1)
            assert (low - exact).abs().max() <= 2e-2 * exact.abs().max()


@pytest.mark.parametrize("parameters", ["p0", "p1", "p2", "p3"])
def test_stock_guider_in_its_original_formulation(guidance_vectors, parameters):
    """diffusers' own guider computes the paper's formula with guidance_scale - 1, and another one by default."""
    vectors = guidance_vectors("apg")
    scale, eta, norm_threshold, momentum = settings(vectors, parameters)
    for step, (original, default) in enumerate(
        zip(vectors[f"c0_{parameters}_orig1_f32"], vectors[f"c0_{parameters}_orig0_f32"], strict=True)
    ):
        cond, uncond = (torch.as_tensor(vectors[f"c0_{name}"][step]).float() for name in ("cond", "uncond"))
        update = projected_update(cond, uncond, eta, norm_threshold, momentum)
        torch.testing.assert_close(cond + scale * update, torch.as_tensor(original), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(uncond + scale * update, torch.as_tensor(default), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("parameters", ["p0", "p1", "p2", "p3"])
@pytest.mark.parametrize(
    ("name", "prediction_type"), [("eps", "epsilon"), ("v", "v_prediction"), ("flow", "flow_prediction")]
)
def test_x0_space_for_every_output(guidance_vectors, name, prediction_type, parameters):
    """float32 against float64: the projection is on x0, which eps at sigma = 14.6 gives with 15 times its rounding."""
    vectors = guidance_vectors("apg_x0")
    scale, eta, norm_threshold, momentum = settings(vectors, parameters)
    sigmas = vectors["sigma_flow" if name == "flow" else "sigma_ve"]
    for step, (sigma, reference) in enumerate(zip(sigmas, vectors[f"{parameters}_{name}"], strict=True)):
        cond, uncond, model_input = (
            torch.as_tensor(vectors[key][step]).float() for key in ("cond", "uncond", "x_model_input")
        )
        point = DenoisingPoint.from_sigma(prediction_type, float(sigma))
        update = projected_output_update(cond, uncond, model_input, point, eta, norm_threshold, momentum)
        truth = torch.as_tensor(reference)
        assert (cond + (scale - 1) * update - truth).abs().max() <= 2e-6 * truth.abs().max()


def test_projected_guidance_on_the_golden_mixture(guidance_vectors, mixture):
    vectors = guidance_vectors("gmm_ref")
    state = MomentumState(-0.5)

    def guide(step, cond, uncond, x):
        return cond + 6.5 * projected_update(cond, uncond, 0.0, 2.5, state)

    end = mixture.run(torch.as_tensor(vectors["x_T"]), torch.as_tensor(vectors["y"]), guide)
    torch.testing.assert_close(end, torch.as_tensor(vectors["apg_0_2p5_m0p5"]), rtol=1e-9, atol=1e-9)
    # The claim in miniature: CFG at 7.5 drives the samples to some four times the length of unguided ones, APG not.
    cfg = torch.as_tensor(vectors["cfg_w7p5"]).norm(dim=1).mean()
    assert end.norm(dim=1).mean() < 0.35 * cfg


def test_neutral_settings_are_cfg():
    cond, uncond = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for off in (None, 0, 0.0):
        assert torch.equal(projected_update(cond, uncond, 1.0, off), cond - uncond)
        assert torch.equal(projected_update(cond, uncond, 1.0, off, MomentumState(0.0)), cond - uncond)


def test_each_sample_on_its_own_and_autocast():
    cond, uncond = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    together = projected_update(cond, uncond, 0.0, 2.5)
    alone = torch.cat([projected_update(cond[i : i + 1], uncond[i : i + 1], 0.0, 2.5) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(projected_update(cond, uncond, 0.0, 2.5), together)


def test_chosen_dimensions_equal_the_stock_guider():
    """Over time alone, as ACE-Step runs it, and per channel."""
    cond, uncond = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for dims in ((2,), (-1, -2), (1, 3)):
        stock = AdaptiveProjectedGuidance(
            guidance_scale=3.0, adaptive_projected_guidance_rescale=2.5, adaptive_projected_guidance_norm_dim=dims,
            eta=0.0, use_original_formulation=True,
        )  # fmt: skip
        ours = cond + 3.0 * projected_update(cond, uncond, 0.0, 2.5, dims=dims)
        torch.testing.assert_close(stock.forward(cond, uncond).pred, ours, rtol=1e-9, atol=1e-9)


def test_momentum_of_solvers_that_evaluate_twice():
    """Heun: the second evaluation of a step sees the momentum of the step before, and does not change it."""
    one, two = MomentumState(-0.75), MomentumState(-0.75)
    for delta in torch.randn(4, 1, 5, generator=torch.Generator().manual_seed(3)):
        first = one.update(delta)
        assert torch.equal(two.update(delta), first)
        assert torch.equal(two.update(delta, advance=False), first)
        two.update(delta + 100, advance=False)


def test_where_x0_does_not_follow():
    cond, uncond, x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(4))
    zero_snr = DenoisingPoint("epsilon", 0.0, 1.0)
    clean = DenoisingPoint.from_sigma("flow_prediction", 0.0)
    for point in (zero_snr, clean):
        assert torch.equal(projected_output_update(cond, uncond, x, point, 0.0, 1.0), cond - uncond)
    assert torch.equal(projected_update(torch.zeros(2, 6), -cond, 0.0), cond)  # no direction: nothing is parallel


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"eta": float("nan")}, "eta"),
        ({"norm_threshold": -1.0}, "norm_threshold"),
        ({"norm_threshold": float("nan")}, "norm_threshold"),
        ({"dims": (0,)}, "batch"),
        ({"dims": (1, -2)}, "different dimensions"),
        ({"dims": ()}, "different dimensions"),
        ({"dims": (5,)}, "different dimensions"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        projected_update(torch.ones(2, 3, 3), torch.zeros(2, 3, 3), **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"eta": "0.5"}, "eta must be a number, got '0.5'"),
        ({"eta": None}, "eta must be a number"),
        ({"norm_threshold": "auto"}, "norm_threshold must be a number"),
        ({"momentum_state": -0.5}, r"must be a MomentumState.*got -0.5.*MomentumState\(-0.5\)"),
    ],
)
def test_input_of_another_type(arguments, words):
    with pytest.raises(TypeError, match=words):
        projected_update(torch.ones(2, 3), torch.zeros(2, 3), **arguments)


def test_bad_momentum():
    with pytest.raises(TypeError, match="momentum must be a number, got None"):
        MomentumState(None)
    with pytest.raises(ValueError, match=r"\(-1, 1\)"):
        MomentumState(1.0)
    state = MomentumState(0.5)
    state.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="changed in mid-run"):
        state.update(torch.ones(1, 3))
    state.reset()
    assert state.update(torch.ones(1, 3)).tolist() == [[1.0] * 3]


def test_zero_star_equals_the_stock_guider(guidance_vectors):
    """Scale 5, and no output at all in the first step (zero-init), which is the caller's."""
    vectors = guidance_vectors("guiders")
    for step, reference in enumerate(vectors["cfg_zero_star"]):
        cond, uncond = (torch.as_tensor(vectors[name][step]).float() for name in ("cond", "uncond"))
        scaled = zero_star_scale(cond, uncond) * uncond
        guided = scaled + 5.0 * (cond - scaled) if step else torch.zeros_like(cond)
        torch.testing.assert_close(guided, torch.as_tensor(reference), rtol=1e-5, atol=1e-5)
    assert zero_star_scale(cond, torch.zeros_like(cond)).flatten().tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="one shape"):
        zero_star_scale(cond, uncond[:1])
