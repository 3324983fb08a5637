"""Pair losses against golden vectors of the official implementations, limits, and bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfnoise.preference import pair_loss, pair_loss_names, register_pair_loss

# Name here -> name and option in the vectors; values were computed in closed form in float64.
CLOSED_FORMS = [
    ("sigmoid", "dpo", {}),
    *[("cdpo", f"cdpo_{rate}", {"flip_rate": rate}) for rate in (0.1, 0.3)],
    *[("robust", f"rdpo_{rate}", {"flip_rate": rate}) for rate in (0.1, 0.3)],
    *[("forward_corrected", f"forward_{rate}", {"flip_rate": rate}) for rate in (0.1, 0.3)],
    ("sym", "sym", {}),
    *[("holder", f"holder_{gamma}", {"holder_gamma": gamma}) for gamma in (1.0, 2.0, 4.0)],
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("name", "key", "options"), CLOSED_FORMS)
def test_value_and_slope_equal_the_closed_forms(preference_vectors, name, key, options, dtype, tolerance):
    vectors = preference_vectors("derived_losses")
    margins = torch.tensor(vectors["h"], dtype=dtype, requires_grad=True)
    values = pair_loss(name, margins, **options)
    (slope,) = torch.autograd.grad(values.sum(), margins)
    assert values.dtype == dtype
    torch.testing.assert_close(values.double(), torch.tensor(vectors[key]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope.double(), torch.tensor(vectors[key + "_dh"]), rtol=tolerance, atol=tolerance)


TRL_CASES = [
    ("sigmoid", "sigmoid", None),
    ("hinge", "hinge", None),
    ("exo_pair", "exo_pair_eps0.001", 0.001),
    *[("robust", f"robust_eps{rate}", rate) for rate in (0.1, 0.3, 0.45)],
]


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
@pytest.mark.parametrize(("name", "key", "flip_rate"), TRL_CASES)
def test_loss_and_gradient_equal_trl(preference_vectors, case, name, key, flip_rate):
    vectors = preference_vectors("trl_losses")
    key = f"{case}_{key}" if f"{case}_{key}_loss" in vectors else f"{case}_{name}"
    logps = torch.tensor(vectors[f"{case}_logps"], requires_grad=True)
    chosen, rejected = logps.sum(1).chunk(2)
    reference = torch.tensor(vectors[f"{case}_ref_chosen"] - vectors[f"{case}_ref_rejected"])
    margins = float(vectors[f"{case}_beta"]) * (chosen - rejected - reference)
    loss = pair_loss(name, margins, flip_rate=flip_rate).mean()
    loss.backward()
    mask = torch.tensor(vectors[f"{case}_completion_mask"][:, 1:])
    # TRL rounds the smoothing of exo_pair to float32 before it takes the logarithm, also in a float64 run.
    tolerance = 1e-7 if name == "exo_pair" else 1e-10
    assert loss.item() == pytest.approx(float(vectors[f"{key}_loss"]), abs=tolerance)
    torch.testing.assert_close(logps.grad * mask, torch.tensor(vectors[f"{key}_grad"]), rtol=0, atol=tolerance)


SYMPO_CASES = [
    ("sym", "sympo_sigmoid", {}),
    ("ropo", "ropo_a14", {"ropo_alpha": 14.0}),
    ("ropo", "ropo_a30", {"ropo_alpha": 30.0}),
    ("robust", "rdpo_eps0.2", {"flip_rate": 0.2}),
    ("cdpo", "cdpo_eps0.2", {"flip_rate": 0.2}),
]


@pytest.mark.parametrize("case", ["c0", "c1"])
@pytest.mark.parametrize(("name", "key", "options"), SYMPO_CASES)
def test_loss_and_gradient_equal_the_official_sympo(preference_vectors, case, name, key, options):
    vectors = preference_vectors("sympo")
    chosen = torch.tensor(vectors[f"{case}_policy_chosen"], requires_grad=True)
    rejected = torch.tensor(vectors[f"{case}_policy_rejected"], requires_grad=True)
    reference = torch.tensor(vectors[f"{case}_ref_chosen"] - vectors[f"{case}_ref_rejected"])
    loss = pair_loss(name, float(vectors[f"{case}_beta"]) * (chosen - rejected - reference), **options).mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(vectors[f"{case}_{key}_loss"]), abs=1e-10)
    for side, tensor in (("chosen", chosen), ("rejected", rejected)):
        expected = torch.tensor(vectors[f"{case}_{key}_grad_{side}"])
        torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["cdpo", "robust", "forward_corrected"])
def test_no_noise_is_plain_dpo(name):
    margins = torch.linspace(-30, 30, 101, requires_grad=True)
    plain, corrected = pair_loss("sigmoid", margins), pair_loss(name, margins, flip_rate=0.0)
    assert torch.equal(plain, corrected)
    slopes = [torch.autograd.grad(values.sum(), margins)[0] for values in (plain, corrected)]
    assert torch.equal(*slopes)


@given(margin=st.floats(-50, 50), flip_rate=st.floats(0, 0.45))
def test_robust_is_unbiased_under_flips(margin, flip_rate):
    kept, flipped = pair_loss("robust", torch.tensor([margin, -margin], dtype=torch.float64), flip_rate=flip_rate)
    clean = pair_loss("sigmoid", torch.tensor([margin], dtype=torch.float64)).item()
    assert ((1 - flip_rate) * kept + flip_rate * flipped).item() == pytest.approx(clean, abs=1e-10)


@given(margin=st.floats(-700, 700), temperature=st.floats(0.1, 20))
def test_sym_is_symmetric(margin, temperature):
    margins = torch.tensor([margin, -margin], dtype=torch.float64, requires_grad=True)
    pair = pair_loss("sym", margins, sym_temperature=temperature)
    assert pair.sum().item() == pytest.approx(temperature, abs=1e-12 * max(1.0, temperature))
    (slope,) = torch.autograd.grad(pair.sum(), margins)
    assert (slope <= 0).all() and (slope >= -0.25).all()


def test_sym_at_temperature_one_is_the_paper_and_linear_far_above():
    margins = torch.linspace(-3, 3, 13)
    assert torch.equal(pair_loss("sym", margins), torch.sigmoid(-margins))
    hot = pair_loss("sym", margins, sym_temperature=1000.0)
    torch.testing.assert_close(hot, 500 - margins / 4, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", ["forward_corrected", "sym", "holder"])
def test_redescending_losses_let_go_of_contradicted_pairs(name):
    margins = torch.tensor([-20.0, 0.0], requires_grad=True)
    (slope,) = torch.autograd.grad(pair_loss(name, margins, flip_rate=0.2).sum(), margins)
    assert abs(slope[0]) < 1e-3 < abs(slope[1])


@pytest.mark.parametrize("name", sorted(pair_loss_names()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    margins = torch.tensor([-700.0, -3.0, 0.0, 3.0, 700.0], dtype=dtype, requires_grad=True)
    values = pair_loss(name, margins, flip_rate=0.1)
    values.sum().backward()
    assert values.dtype == torch.float32
    assert torch.isfinite(values).all() and torch.isfinite(margins.grad).all()


def test_flip_rates_per_pair_equal_one_rate_each():
    margins, rates = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.0, 0.1, 0.4])
    for name in ("cdpo", "robust", "forward_corrected"):
        together = pair_loss(name, margins, flip_rate=rates)
        alone = [pair_loss(name, margins[i : i + 1], flip_rate=rates[i].item()).item() for i in range(3)]
        assert together.tolist() == pytest.approx(alone, rel=1e-6)


def test_robust_options():
    margins = torch.tensor([1.0, 5.0, 50.0], requires_grad=True)
    limited = pair_loss("robust", margins, flip_rate=0.3, robust_margin_limit=5.0)
    assert limited[1].item() == limited[2].item()
    assert torch.autograd.grad(limited.sum(), margins)[0][2] == 0
    rescaled = pair_loss("robust", margins, flip_rate=0.3, robust_rescale=True)
    torch.testing.assert_close(rescaled, 0.4 * pair_loss("robust", margins, flip_rate=0.3))


@pytest.mark.parametrize("flip_rate", [-0.1, 0.5, 0.7, math.nan, math.inf])
def test_flip_rate_out_of_range(flip_rate):
    with pytest.raises(ValueError, match=r"flip_rate must be in \[0, 0.5\)"):
        pair_loss("robust", torch.zeros(2), flip_rate=flip_rate)
    with pytest.raises(ValueError, match=r"flip_rate must be in \[0, 0.5\)"):
        pair_loss("robust", torch.zeros(2), flip_rate=torch.tensor([0.1, flip_rate]))


def test_bad_calls_say_what_to_do():
    margins = torch.zeros(3)
    with pytest.raises(ValueError, match="unknown pair loss 'dpo'.*sigmoid.*register_pair_loss"):
        pair_loss("dpo", margins)
    with pytest.raises(ValueError, match="needs a flip rate.*'sym'"):
        pair_loss("robust", margins)
    with pytest.raises(ValueError, match="unknown option 'gamma'.*holder_gamma"):
        pair_loss("holder", margins, gamma=2.0)
    with pytest.raises(ValueError, match=r"shape \(3,\), got shape \(2,\)"):
        pair_loss("robust", margins, flip_rate=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="floating tensor of shape"):
        pair_loss("sym", torch.zeros(3, 2))
    with pytest.raises(ValueError, match="floating tensor of shape"):
        pair_loss("sym", torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="holder_gamma must be a finite number above 0"):
        pair_loss("holder", margins, holder_gamma=0.0)
    with pytest.raises(ValueError, match="infinite at a flip rate of 0"):
        pair_loss("exo_pair", margins, flip_rate=0.0)


def test_register_your_own():
    register_pair_loss("test_cubic", lambda margins, context: (1 - margins) ** 3 * context.beta)
    assert pair_loss("test_cubic", torch.tensor([0.0]), beta=2.0).item() == 2.0
    with pytest.raises(ValueError, match="built in"):
        register_pair_loss("sigmoid", lambda margins, context: margins)
    with pytest.raises(TypeError, match="callable"):
        register_pair_loss("test_other", 3)


def test_shapes_in_annotations_are_enforced_in_the_tests():
    from hfnoise.preference import pair_losses
    from hfnoise.preference.pair_context import PairContext

    with pytest.raises(Exception, match="Type-check error"):
        pair_losses.sym(torch.zeros(2, 2), PairContext())
