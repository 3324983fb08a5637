"""The arithmetic of One More Step and SingDiffusion against the golden vectors (tests/vectors/one_more_step)."""

import numpy
import pytest
import torch

from hfnoise.latents import ResidualStatistics, brightness_estimate, estimated_x0, guided_estimate, one_more_step
from tests.conftest import VECTORS


def cases(name):
    arrays = dict(numpy.load(VECTORS / "one_more_step" / f"dev_{name}.npz"))
    number = 0
    while any(key.startswith(f"case{number}_") for key in arrays):
        prefix = f"case{number}_"
        yield {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        number += 1


def tensors(case, *names):
    return [torch.as_tensor(case[name]) for name in names]


@pytest.mark.parametrize("case", list(cases("oms_step")))
def test_official_step(case):
    v, z, truth = tensors(case, "v_pred", "z", "out_upstream")
    if int(case["cfg"]):
        v = guided_estimate(*v.chunk(2), float(case["oms_guidance_scale"]))
    power = float(case["alpha_bar"])
    official = one_more_step(v, z, power, compat="official")
    assert (official - truth).abs().max() <= 1e-6
    # Ours, eta=1: the noise at its standard deviation.
    ours = one_more_step(v, torch.zeros_like(z), power, 1.0, fresh_noise=z)
    assert (ours - (-(power**0.5) * v + (1 - power) ** 0.5 * z)).abs().max() <= 1e-6
    assert (ours - truth).abs().max() > 1e-4
    torch.testing.assert_close(one_more_step(v, z, power, 1.0), ours)
    # The noise that the network was given has no part in the official step.
    given = one_more_step(v, torch.zeros_like(z), power, 1.0, compat="official", fresh_noise=z)
    assert torch.equal(given, official)


def test_singdiffusion():
    case = numpy.load(VECTORS / "one_more_step" / "dev_singdiffusion.npz")
    cond, uncond, noise, truth = tensors(case, "y_cond", "y_uncond", "x1", "out")
    guided = guided_estimate(uncond, cond, float(case["guidance_scale"]), "normalized")
    ours = one_more_step(-estimated_x0(guided, "sample"), noise, float(case["alpha_bar"]))
    assert (ours - truth).abs().max() <= 1e-6


def test_vectors_are_found():
    assert len(list(cases("oms_step"))) == 4


def test_eta_keeps_the_variance():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 200, 200, generator=generator)
    v = torch.zeros_like(noise)
    for eta in (0.0, 0.5, 1.0):
        state = one_more_step(v, noise, 0.1, eta, generator=generator)
        # Standard deviation of a standard deviation of 40 000 numbers: 0.0034.
        assert state.std().item() == pytest.approx(0.9**0.5, abs=0.015)
        similarity = torch.cosine_similarity(state.flatten(), noise.flatten(), 0).item()
        assert similarity == pytest.approx((1 - eta**2) ** 0.5, abs=0.02)
    drawn = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    for compat in (None, "official"):
        state = one_more_step(v, noise, 0.1, 1.0, compat, generator=torch.Generator().manual_seed(1))
        assert torch.equal(state, one_more_step(v, drawn, 0.1, 1.0, compat))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_summed_in_float32(dtype):
    v, noise = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(one_more_step(v, noise, 0.005), one_more_step(v.float(), noise.float(), 0.005))


def test_numbers_in_tensors():
    """One alpha_bar, eta or scale may come in a tensor; there may be an alpha_bar a sample."""
    v, noise = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    powers = torch.tensor([0.25, 0.005])
    alone = [one_more_step(v[row : row + 1], noise[row : row + 1], power) for row, power in enumerate(powers)]
    for shape in ((2,), (2, 1, 1, 1)):
        assert torch.equal(one_more_step(v, noise, powers.reshape(shape)), torch.cat(alone))
    one, half = torch.tensor(1.0), torch.tensor(0.5)
    assert torch.equal(one_more_step(v, noise, half, one, "official"), one_more_step(v, noise, 0.5, 1.0, "official"))
    assert torch.equal(guided_estimate(v, noise, numpy.array(2.0)), guided_estimate(v, noise, 2.0))


X = torch.zeros(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_more_step(X, X, 1.5), r"alpha_bar must be in \[0, 1\], got 1.5"),
        (lambda: one_more_step(X, X, float("nan")), "alpha_bar"),
        (lambda: one_more_step(X, X, torch.ones(2)), r"one number or one a sample, .* \(2,\) for 1 samples"),
        (lambda: one_more_step(X, X[:, :1], 0.1), r"v is of shape \(1, 2, 4, 4\)"),
        (lambda: one_more_step(X, X, 0.1, 1.5), r"eta must be in \[0, 1\], got 1.5"),
        (lambda: one_more_step(X, X, 0.1, "0.5"), r"eta must be in \[0, 1\], got '0.5'"),
        (lambda: one_more_step(X, X, 0.1, 0.5, "official"), "replaces all of the noise; eta=0.5 has no part"),
        (lambda: one_more_step(X, X, 0.1, 0.5, fresh_noise=X[:, :1]), r"fresh_noise is of shape \(1, 1, 4, 4\)"),
        (lambda: guided_estimate(X, X, "2"), "at least 0, got '2'"),
        (lambda: brightness_estimate(None, [1.0, 1.0], X), r"in \[-1, 1\], .* got None"),
        (lambda: one_more_step(X, X, 0.1, compat="official-2"), "compat must be one of"),
        (lambda: guided_estimate(X, X, -1.0), "at least 0, got -1"),
        (lambda: guided_estimate(X, X, 0.0, "normalized"), "above 0, since it divides"),
        (lambda: guided_estimate(X, X, 1.0, "other"), "guidance_mode must be one of"),
        (lambda: estimated_x0(X, "epsilon"), "prediction_type of the module"),
        (lambda: brightness_estimate(1.5, [1.0, 1.0], X), r"in \[-1, 1\]"),
        (lambda: brightness_estimate(0.5, [1.0], X), "1 numbers, and the latents 2 channels"),
        (lambda: ResidualStatistics([0.0], [[1.0, 0.0]]), "one a channel"),
        (lambda: ResidualStatistics([0.0], [[float("nan")]]), "not finite"),
        (lambda: ResidualStatistics([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (lambda: ResidualStatistics([0.0], [[-1.0]]), "negative eigenvalue"),
        (lambda: ResidualStatistics.fit(X), "at least two residuals"),
        (lambda: ResidualStatistics.from_config({"mean": [0.0]}), "entries 'mean' and 'covariance'"),
        (lambda: ResidualStatistics([0.0], [[1.0]]).transform(torch.zeros(1, 3)), "of 1 channels"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_residual_statistics_are_matched():
    truth = ResidualStatistics([0.1, -0.2, 0.0], [[1.0, 0.5, 0.0], [0.5, 0.8, 0.1], [0.0, 0.1, 0.05]])
    generator = torch.Generator().manual_seed(0)
    drawn = truth.transform(torch.randn(20000, 3, generator=generator))
    fitted = ResidualStatistics.fit(drawn[:, :, None, None].expand(-1, -1, 2, 2))
    # Four standard errors of 20 000 draws.
    torch.testing.assert_close(torch.tensor(fitted.mean), torch.tensor(truth.mean), atol=0.03, rtol=0.0)
    torch.testing.assert_close(torch.tensor(fitted.covariance), torch.tensor(truth.covariance), atol=0.04, rtol=0.0)
    assert ResidualStatistics.from_config(truth.to_config()) == truth


def test_singular_covariance():
    """All channels scatter together, as those of a grey world do."""
    flat = ResidualStatistics([0.0, 0.0], [[0.04, 0.04], [0.04, 0.04]])
    drawn = flat.transform(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(drawn[:, 0], drawn[:, 1], atol=1e-6, rtol=0.0)
    assert drawn.std() > 0.1
