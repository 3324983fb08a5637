"""The arithmetic of noise search: candidates, neighbours, ranks, budget."""

from pathlib import Path

import numpy
import pytest
import torch

from hfnoise.latents import EvaluationBudget, candidate_noise, mean_ranks, noise_neighbour, noise_seeds

VECTORS = Path(__file__).parents[1] / "vectors" / "golden_noise"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_neighbours_are_those_of_the_official_code():
    golden = numpy.load(VECTORS / "dev_neighbours.npz")
    noise = torch.as_tensor(golden["x"]).expand(4, -1, -1, -1)
    directions = torch.as_tensor(golden["gaussian"]).reshape(4, 4, 8, 8)
    found = noise_neighbour(noise, directions, float(golden["threshold"]))
    torch.testing.assert_close(found, torch.as_tensor(golden["neighbours"])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("cosine", [-1.0, 0.0, 0.95])
def test_a_neighbour_has_its_angle_and_the_length(cosine):
    noise, direction = normal(3, 4, 8, 8), 100 * normal(3, 4, 8, 8, seed=1)
    found = noise_neighbour(noise, direction, cosine)
    similarity = torch.cosine_similarity(found.flatten(1), noise.flatten(1))
    torch.testing.assert_close(similarity, torch.full((3,), cosine), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), noise.flatten(1).norm(dim=1))
    torch.testing.assert_close(noise_neighbour(noise[1:2], direction[1:2], cosine), found[1:2], rtol=0, atol=0)
    assert noise_neighbour(noise, direction, 1.0) is noise


def test_neighbours_refuse():
    with pytest.raises(ValueError, match=r"cosine must be in \[-1, 1\], got 1.5"):
        noise_neighbour(normal(1, 4), normal(1, 4), 1.5)
    with pytest.raises(ValueError, match=r"direction is of shape \(1, 3\)"):
        noise_neighbour(normal(1, 4), normal(1, 3), 0.5)
    with pytest.raises(TypeError, match="cosine must be a number"):
        noise_neighbour(normal(1, 4), normal(1, 4), "0.5")


def test_seeds_are_of_the_sample_in_any_batch_dtype_and_scale():
    noise = normal(3, 4, 8, 8)
    seeds = noise_seeds(noise)
    assert len(set(seeds)) == 3
    assert noise_seeds(noise[1:2]) == seeds[1:2]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert noise_seeds((14.6 * noise).to(dtype)) == seeds


def test_candidates_are_standard_normal_and_told_apart():
    found = torch.stack([candidate_noise(seed, index, (4, 16, 16)) for seed in (5, 6) for index in range(1, 9)])
    assert len({float(one.sum()) for one in found}) == 16
    assert found.mean().abs() < 0.03 and (found.var() - 1).abs() < 0.05
    torch.testing.assert_close(candidate_noise(6, 8, (4, 16, 16)), found[-1], rtol=0, atol=0)


def test_ranks_do_not_depend_on_units_and_share_ties():
    scores = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    ranks = mean_ranks(scores)
    torch.testing.assert_close(mean_ranks(torch.stack([scores[0].exp(), 1e6 * scores[1]])), ranks, rtol=0, atol=0)
    expected = scores.argsort(-1).argsort(-1).float().mean(0)
    torch.testing.assert_close(ranks, expected, rtol=0, atol=0)
    assert mean_ranks(torch.zeros(2, 4)).tolist() == [1.5] * 4


def test_a_budget_is_never_overspent():
    budget = EvaluationBudget(10, samples=3)
    assert budget.spend(29) and not budget.spend(2) and budget.spend(1)
    assert (budget.left, budget.per_sample_spent, budget.affordable(1)) == (0, 10, 0)
    with pytest.raises(ValueError, match="at least 1 evaluation"):
        EvaluationBudget(0)
    with pytest.raises(TypeError, match="whole number, got 2.0"):
        EvaluationBudget(2.0)
