"""Residual statistics above the mean: waves, what is fitted and drawn at every size, what the config holds."""

import json

import pytest
import torch

from hfnoise.latents import ResidualStatistics
from hfnoise.latents import residuals as residuals_module
from hfnoise.latents.cosine_basis import cosine_amplitudes, cosine_basis, cosine_waves
from hfnoise.pipelines import TerminalPrior
from hfnoise.pipelines.start_context import StartContext

PART = ResidualStatistics([0.0, 0.1], [[0.09, 0.03], [0.03, 0.04]])
NONE = ResidualStatistics([0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]])
# Light from the left in both channels; nothing from above.
LIT = ResidualStatistics([0.1, -0.2], [[1.0, 0.5], [0.5, 0.8]], [PART, NONE, NONE])


def context(batch, generator):
    return StartContext(None, {"generator": generator}, batch, torch.device("cpu"))


def draw(prior, *shape, seed=0):
    return prior.estimate(torch.zeros(shape), context(shape[0], torch.Generator().manual_seed(seed))).x0


def test_waves_are_orthogonal_and_of_mean_square_one():
    for size in (3, 8, 9):
        basis = cosine_basis(3, size)
        torch.testing.assert_close(basis @ basis.T / size, torch.eye(3, dtype=torch.float64))
    amplitudes = torch.randn(5, 2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size in ((3, 3), (8, 5), (16, 32)):
        torch.testing.assert_close(cosine_amplitudes(cosine_waves(amplitudes, *size), 3), amplitudes)
    # Of a video the mean over its frames counts.
    frames = cosine_waves(amplitudes, 8, 5)[:, :, None] * torch.tensor([0.5, 1.5])[:, None, None]
    torch.testing.assert_close(cosine_amplitudes(frames, 3), amplitudes)


def test_a_ramp_is_nearly_one_wave():
    line = torch.linspace(-1.0, 1.0, 64, dtype=torch.float64)
    amplitude = cosine_amplitudes(line.expand(1, 1, 64, 64), 2)[0, 0, 1]
    assert float(amplitude**2 / line.square().mean()) == pytest.approx(96 / torch.pi**4, abs=1e-3)


def test_the_mean_alone_is_drawn_as_ever():
    """The arithmetic of the first version, to the bit: flat, of the symmetric root in float64."""
    statistics = ResidualStatistics(LIT.mean, LIT.covariance)
    values, vectors = torch.linalg.eigh(torch.tensor(LIT.covariance, dtype=torch.float64))
    root = ((vectors * values.sqrt()) @ vectors.T).float()
    normal = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    truth = (torch.tensor(LIT.mean) + normal @ root)[:, :, None, None].expand(3, 2, 4, 6)
    assert torch.equal(draw(TerminalPrior(statistics), 3, 2, 4, 6), truth)
    # More frequencies leave the means of the same generator where they are.
    torch.testing.assert_close(draw(TerminalPrior(LIT), 3, 2, 4, 6).mean((2, 3)), truth[..., 0, 0])


def test_a_sample_does_not_depend_on_its_batch():
    prior, noise = TerminalPrior(LIT), torch.zeros(3, 2, 8, 8)
    together = prior.estimate(noise, context(3, [torch.Generator().manual_seed(seed) for seed in range(3)])).x0
    for seed in range(3):
        alone = prior.estimate(noise[:1], context(1, [torch.Generator().manual_seed(seed)])).x0
        torch.testing.assert_close(together[seed : seed + 1], alone)
    assert not torch.equal(together[0], together[1])


def test_the_root_is_computed_once(monkeypatch):
    prior = TerminalPrior(ResidualStatistics.from_config(LIT.to_config()))
    first = draw(prior, 3, 2, 8, 8)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    assert torch.equal(draw(prior, 3, 2, 8, 8), first)


@pytest.mark.parametrize("size", [(16, 16), pytest.param((32, 32), marks=pytest.mark.slow), (8, 24)])
def test_what_was_fitted_at_one_size_is_drawn_at_every_other(size):
    """The variance of the mean and that of the field, in every pixel, are those of theory."""
    fitted = ResidualStatistics.fit(draw(TerminalPrior(LIT), 4000, 2, 16, 16), frequencies=2)
    field = draw(TerminalPrior(fitted), 4000, 2, *size, seed=1)
    # Four standard errors of a variance of 4000 samples, sqrt(2 / 4000), twice: of the fit and of the draw.
    close = {"rtol": 4 * (2 / 4000) ** 0.5 * 2**0.5, "atol": 1e-5}
    variances = torch.tensor([[part.covariance[c][c] for c in range(2)] for part in (LIT, PART)])
    torch.testing.assert_close(field.mean((2, 3)).var(0), variances[0], **close)
    wave = cosine_basis(2, size[1])[1].float()
    truth = variances[0][:, None] + variances[1][:, None] * wave.square()
    torch.testing.assert_close(field.var(0), truth[:, None].expand(2, *size), **close)
    # Waves have mean square 1: the variance a pixel is the sum of those of the frequencies.
    torch.testing.assert_close(field.var(0).mean((1, 2)), variances.sum(0), **close)
    found = ResidualStatistics.fit(field, frequencies=2)
    torch.testing.assert_close(
        torch.tensor(found.spectra[0].mean), torch.tensor(PART.mean), rtol=0.0, atol=8 * 0.3 / 4000**0.5
    )


def test_the_first_frequency_is_the_mean():
    images = torch.randn(6, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    whole, means = (ResidualStatistics.fit(images, frequencies) for frequencies in (2, 1))
    assert (whole.mean, whole.covariance) == (means.mean, means.covariance) and means.spectra == ()
    assert (whole.frequencies, means.frequencies) == (2, 1)
    assert ResidualStatistics.fit(images.mean((2, 3))).channels == 2
    assert TerminalPrior.fit(images, frequencies=2).statistics == whole
    assert whole.spectra[0] == ResidualStatistics.fit(cosine_amplitudes(images, 2)[..., 1])


def test_config():
    """Lists of floats; without spectra the entries of the first version, which are still read."""
    config = json.loads(json.dumps(LIT.to_config()))
    assert ResidualStatistics.from_config(config) == LIT and len(config["spectra"]) == 3
    old = {"mean": [0.0], "covariance": [[1.0]]}
    assert ResidualStatistics.from_config(old).to_config() == old


def test_frames_share_the_draw():
    field = draw(TerminalPrior(LIT), 2, 2, 3, 8, 8)
    assert torch.equal(field[:, :, 0], field[:, :, 2]) and field.shape == (2, 2, 3, 8, 8)
    assert torch.equal(field[:, :, 0], draw(TerminalPrior(LIT), 2, 2, 8, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ResidualStatistics([0.0], [[1.0]], [PART]), "spectra of 1 frequencies beside the mean; k x k"),
        (lambda: ResidualStatistics([0.0], [[1.0]], [PART] * 3), "a mean and a covariance of 1 channels"),
        (lambda: ResidualStatistics(PART.mean, PART.covariance, [LIT] * 3), "and no spectra"),
        (lambda: ResidualStatistics.fit(torch.zeros(2, 1, 4, 4), 0), "frequencies is 0; give a whole number"),
        (lambda: ResidualStatistics.fit(torch.zeros(2, 1, 4, 4), True), "frequencies is True"),
        (lambda: ResidualStatistics.fit(torch.zeros(2, 1, 4, 2), 3), "2 pixels has 1 to 2 frequencies .* got 3"),
        (lambda: ResidualStatistics.fit(torch.zeros(2, 1), 2), r"height, width\), got \(2, 1\)"),
        (lambda: draw(TerminalPrior(LIT), 1, 2, 1, 8), "1 pixels has 1 to 1 frequencies"),
        (lambda: draw(TerminalPrior(LIT), 1, 2, 8), r"height, width\), got \(1, 2, 8\)"),
        (lambda: draw(TerminalPrior(LIT), 1, 3, 8, 8), "of 2 channels, and the latents have 3"),
        (lambda: residuals_module.check_frequencies(1.5, "option"), "option is 1.5"),
        (lambda: ResidualStatistics.from_config({**LIT.to_config(), "more": 1}), "may have 'spectra', got"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
