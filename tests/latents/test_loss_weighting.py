"""Loss weightings against kohya's code, diffusers' formula, and each other through the errors of one prediction."""

from pathlib import Path

import numpy
import pytest
import torch

from hfnoise.latents import DebiasWeighting, LossWeighting, MinSNRWeighting, P2Weighting, UniformWeighting

OBJECTIVES = (MinSNRWeighting(), MinSNRWeighting(0.5), P2Weighting(), P2Weighting(2.0, 0.5), DebiasWeighting())


@pytest.fixture(scope="module")
def vectors():
    return dict(numpy.load(Path(__file__).parent.parent / "vectors" / "one_more_step" / "dev_weights.npz"))


@pytest.mark.parametrize(
    ("weighting", "prediction_type", "name"),
    [
        (MinSNRWeighting(), "epsilon", "min_snr_eps"),
        (MinSNRWeighting(), "v_prediction", "min_snr_v"),
        (DebiasWeighting(kohya=True), "epsilon", "debias_eps"),
        (DebiasWeighting(kohya=True), "v_prediction", "debias_v"),
    ],
)
def test_equal_to_kohyas_code(vectors, weighting, prediction_type, name):
    ours = weighting.weights(torch.as_tensor(vectors["snr"]), prediction_type)
    torch.testing.assert_close(ours.float(), torch.as_tensor(vectors[name]), rtol=1e-6, atol=0)


def test_the_eps_loss_as_a_v_loss_has_kohyas_scale(vectors):
    snr = torch.as_tensor(vectors["snr"])
    snr = snr.clamp(max=1000)  # kohya's cut
    ours = P2Weighting(gamma=0).weights(snr, "v_prediction")  # gamma 0: the uniform eps loss
    torch.testing.assert_close(ours.float(), torch.as_tensor(vectors["v_like_eps_scale"]), rtol=1e-6, atol=0)


def test_the_vectors_reach_both_sides_of_gamma_and_of_kohyas_cut(vectors):
    snr = vectors["snr"]
    assert snr.min() < vectors["gamma"] < snr.max() and snr.max() > 1000


@pytest.mark.parametrize("weighting", OBJECTIVES, ids=str)
def test_every_prediction_type_has_the_same_objective(weighting):
    sigma = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    x0, error, eps = 0.7, 0.3, torch.full_like(sigma, -1.1)

    def losses(alpha, prediction_type):
        """Weighted losses of a model whose x0 is off by `error`, for the same x_t."""
        noisy = alpha * x0 + sigma * eps
        wrong_x0 = x0 + error
        wrong_eps = (noisy - alpha * wrong_x0) / sigma
        differences = {
            "sample": wrong_x0 - x0 + 0 * sigma,
            "epsilon": wrong_eps - eps,
            "v_prediction": alpha * (wrong_eps - eps) - sigma * (wrong_x0 - x0),
            "flow_prediction": (wrong_eps - eps) - (wrong_x0 - x0),
        }
        return weighting.weights((alpha / sigma) ** 2, prediction_type) * differences[prediction_type] ** 2

    for alpha, other in (((1 - sigma**2).sqrt(), "v_prediction"), (1 - sigma, "flow_prediction")):
        for name in ("epsilon", other):
            torch.testing.assert_close(losses(alpha, name), losses(alpha, "sample"), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("weighting", "prediction_type", "at_zero", "at_infinity"),
    [
        (MinSNRWeighting(), "epsilon", 1, 0),
        (MinSNRWeighting(), "v_prediction", 0, 0),
        (MinSNRWeighting(), "sample", 0, 5),
        (MinSNRWeighting(), "flow_prediction", 0, 0),
        (P2Weighting(), "epsilon", 1, 0),
        (P2Weighting(), "flow_prediction", 0, 0),
        (P2Weighting(), "sample", 0, 1),
        (P2Weighting(k=2.0, gamma=2.0), "sample", 0, 0),
        (P2Weighting(gamma=0), "v_prediction", 0, 1),
        (DebiasWeighting(), "v_prediction", 0, 0),
        (DebiasWeighting(), "flow_prediction", 0, 0),
        (DebiasWeighting(kohya=True), "v_prediction", 1, 1 / 1001),
        (UniformWeighting(), "flow_prediction", 1, 1),
    ],
)
def test_both_ends_of_the_schedule_are_limits(weighting, prediction_type, at_zero, at_infinity):
    ends = weighting.weights(torch.tensor([0.0, torch.inf]), prediction_type)
    assert ends.tolist() == [at_zero, at_infinity]
    near = weighting.weights(torch.tensor([1e-14, 1e14], dtype=torch.float64), prediction_type)
    torch.testing.assert_close(near, ends, rtol=0, atol=1e-6)


def test_an_infinite_weight_is_refused():
    with pytest.raises(ValueError, match="infinite at SNR 0.0. Use prediction_type='v_prediction'"):
        DebiasWeighting().weights(torch.tensor([0.0, 1.0]), "epsilon")
    with pytest.raises(ValueError, match="kohya's debiased estimation is for eps and v"):
        DebiasWeighting(kohya=True).weights(torch.ones(1), "sample")


@pytest.mark.parametrize(
    ("name", "settings", "weighting"),
    [
        ("uniform", {}, UniformWeighting()),
        ("min_snr", {"gamma": 3.0}, MinSNRWeighting(3.0)),
        ("p2", {"k": 2.0}, P2Weighting(2.0, 1.0)),
        ("debias", {}, DebiasWeighting()),
        ("kohya", {}, DebiasWeighting(kohya=True)),
    ],
)
def test_names(name, settings, weighting):
    assert LossWeighting.named(name, **settings) == weighting


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LossWeighting.named("snr"), "loss_weighting is 'snr'; choose uniform, min_snr"),
        (lambda: LossWeighting.named("debias", gamma=5), r"no settings \['gamma'\]; it has none"),
        (lambda: LossWeighting.named("kohya", kohya=False), r"no settings \['kohya'\]"),
        (lambda: MinSNRWeighting(0), "snr_gamma.* is 0; give a number above 0"),
        (lambda: MinSNRWeighting(True), "is True; give a number above 0"),
        (lambda: P2Weighting(gamma=-1), "gamma of P2 is -1; give a number of at least 0"),
        (lambda: MinSNRWeighting().weights(torch.tensor([-1.0]), "epsilon"), "negative or NaN"),
        (lambda: MinSNRWeighting().weights(torch.tensor([torch.nan]), "epsilon"), "negative or NaN"),
        (lambda: MinSNRWeighting().weights(torch.ones(1), "eps"), "prediction_type must be one of"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
