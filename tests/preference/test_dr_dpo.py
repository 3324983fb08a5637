"""Dr. DPO on a batch: golden vectors of the official code, the limits in dr_beta, numerics where it overflows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfnoise.preference import dr_dpo_value, dr_dpo_weights, pair_loss
from hfnoise.preference.dr_dpo import SMALLEST_DR_BETA


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dr_beta", [0.1, 1.0, 10.0])
def test_weights_and_value_equal_the_closed_forms(preference_vectors, dr_beta, dtype, tolerance):
    vectors = preference_vectors("derived_losses")
    losses = pair_loss("sigmoid", torch.tensor(vectors["h"], dtype=dtype))
    weights, value = dr_dpo_weights(losses, dr_beta), dr_dpo_value(losses, dr_beta)
    assert weights.dtype == value.dtype == dtype
    expected = torch.tensor(vectors[f"dr_weights_{dr_beta}"])
    torch.testing.assert_close(weights.double(), expected, rtol=tolerance, atol=tolerance)
    assert value.item() == pytest.approx(float(vectors[f"dr_value_{dr_beta}"]), rel=tolerance)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dr_beta", ["0.1", "0.5", "1.0", "2.0", "10.0"])
@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_loss_and_gradient_equal_the_official_code(preference_vectors, case, dr_beta, smoothing):
    vectors = preference_vectors("drdpo")
    policy = {
        side: torch.tensor(vectors[f"{case}_policy_{side}"], requires_grad=True) for side in ("chosen", "rejected")
    }
    reference = torch.tensor(vectors[f"{case}_ref_chosen"] - vectors[f"{case}_ref_rejected"])
    margins = float(vectors[f"{case}_beta"]) * (policy["chosen"] - policy["rejected"] - reference)
    loss = dr_dpo_value(pair_loss("cdpo", margins, flip_rate=smoothing), float(dr_beta))
    loss.backward()
    key = f"{case}_drdpo_bp{dr_beta}_ls{smoothing}"
    assert loss.item() == pytest.approx(float(vectors[f"{key}_loss"]), abs=1e-10)
    for side, tensor in policy.items():
        torch.testing.assert_close(tensor.grad, torch.tensor(vectors[f"{key}_grad_{side}"]), rtol=0, atol=1e-10)


@given(
    st.lists(st.floats(-50, 700), min_size=1, max_size=20),
    st.floats(SMALLEST_DR_BETA, 1e6),
)
def test_gradient_is_the_weights_and_value_lies_between_smallest_and_mean(values, dr_beta):
    losses = torch.tensor(values, requires_grad=True)
    value = dr_dpo_value(losses, dr_beta)
    (gradient,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(gradient, dr_dpo_weights(losses, dr_beta), rtol=1e-4, atol=1e-6)
    slack = 1e-5 * (1 + losses.abs().max().item())
    assert losses.min().item() - slack <= value.item() <= losses.mean().item() + slack


def test_one_pair_is_dpo():
    assert dr_dpo_weights(torch.tensor([3.0]), 0.5).tolist() == [1.0]
    assert dr_dpo_value(torch.tensor([3.0]), 0.5).item() == 3.0


def test_limits_in_dr_beta():
    losses = torch.tensor([12.0, 12.25, 12.5])
    assert dr_dpo_value(losses, 1e6).item() == 12.25  # exp of the bare losses gives 12.28 in float32
    assert dr_dpo_value(losses, math.inf).item() == 12.25
    assert dr_dpo_value(losses, 1e-2).item() == pytest.approx(12.0 + 1e-2 * math.log(3))
    assert dr_dpo_value(torch.tensor([500.0, 501.0]), 0.1).isfinite()  # exp(-5000) is 0


def test_half_precision_is_computed_in_float32():
    losses = torch.tensor([0.5, 2.0, 3.0])
    for dtype in (torch.float16, torch.bfloat16):
        assert dr_dpo_weights(losses.to(dtype), 0.1).dtype == torch.float32
        assert dr_dpo_value(losses.to(dtype), 0.1).item() == dr_dpo_value(losses, 0.1).item()


@pytest.mark.parametrize("dr_beta", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("function", [dr_dpo_weights, dr_dpo_value])
def test_bad_dr_beta_raises(function, dr_beta):
    with pytest.raises(ValueError, match="dr_beta must be above 0"):
        function(torch.ones(2), dr_beta)


@pytest.mark.parametrize("losses", [torch.ones(0), torch.ones(2, 2), torch.ones(2, dtype=torch.long)])
@pytest.mark.parametrize("function", [dr_dpo_weights, dr_dpo_value])
def test_bad_losses_raise(function, losses):
    with pytest.raises((ValueError, TypeError)):
        function(losses, 1.0)
