"""The closed form of BVPO's mixing share: golden vectors, a simulation with known moments, bad input."""

import pytest
import torch

from hfnoise.preference import optimal_trace_alpha
from hfnoise.preference.trace_alpha import closed_form_alpha


def test_equals_the_vectors(preference_vectors):
    vectors = preference_vectors("bvpo_derived")
    found = optimal_trace_alpha(torch.tensor(vectors["g_trace"]), torch.tensor(vectors["g_empty"]))
    expected = [float(vectors[name]) for name in ("alpha_star", "tr_cov_t", "tr_cov_e", "tr_cov_te", "bias2")]
    assert list(found) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [1, 8, 64])
def test_no_other_share_has_a_smaller_error(count):
    trace_variance, empty_variance, covariance, squared_bias = 5.0, 1.0, 0.5, 0.2
    best = closed_form_alpha(trace_variance, empty_variance, covariance, squared_bias, count)

    def error(alpha):
        variance = alpha**2 * trace_variance + (1 - alpha) ** 2 * empty_variance + 2 * alpha * (1 - alpha) * covariance
        return (1 - alpha) ** 2 * squared_bias + variance / count

    assert all(error(best) <= error(step / 1000) + 1e-12 for step in range(1001))


def test_moments_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    shift = torch.full((20,), 0.3)
    found = []
    for _ in range(2000):
        trace = 2.0 * torch.randn(4, 20, generator=generator)
        empty = shift + 0.5 * trace + torch.randn(4, 20, generator=generator)
        found.append(torch.tensor(optimal_trace_alpha(trace, empty)[1:]))
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / 2000**0.5
    expected = torch.tensor([20 * 4.0, 20 * 2.0, 20 * 2.0, 20 * 0.09])
    assert torch.all((mean - expected).abs() < 4 * error)


def test_gradients_that_agree_leave_the_union():
    same = torch.ones(3, 2)
    assert optimal_trace_alpha(same, same).alpha == 0.5


@pytest.mark.parametrize(("trace", "empty"), [((1, 3), (1, 3)), ((4, 3), (4, 2)), ((4,), (4,))])
def test_bad_shapes_raise(trace, empty):
    with pytest.raises((ValueError, TypeError), match=r"trace_grads|shape|dim"):
        optimal_trace_alpha(torch.ones(trace), torch.ones(empty))
