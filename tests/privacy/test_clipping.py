"""Clipped sums: the golden vectors, the bound itself, and units that must not count."""

import math

import pytest
import torch

from hfnoise.privacy import clip_per_unit
from tests.privacy.lora_models import load_vectors


def gradients(units=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 3, units)
    return {
        "matrix": torch.randn(units, 7, 3, generator=generator) * scale[:, None, None],
        "vector": torch.randn(units, 5, generator=generator) * scale[:, None],
        "number": torch.randn(units, generator=generator) * scale,
    }


def each(grads, clipping, max_norm=1.5):
    """Return what every unit adds, as one flat row per unit, by clipping it alone."""
    units = len(next(iter(grads.values())))
    parts = [clip_per_unit({k: g[i : i + 1] for k, g in grads.items()}, max_norm, clipping) for i in range(units)]
    return torch.stack([torch.cat([total.flatten() for total in part.summed.values()]) for part in parts])


@pytest.mark.parametrize("case", [0, 1])
def test_golden_vectors(case):
    vectors = load_vectors("dp_persample")
    names = [name for name in vectors if name.startswith(f"clip{case}_gs")]
    summed, norms = clip_per_unit([vectors[name] for name in names], float(vectors[f"clip{case}_C"]))
    torch.testing.assert_close(norms, vectors[f"clip{case}_norms"], atol=1e-5, rtol=1e-6)
    for name, total in zip(names, summed, strict=True):
        torch.testing.assert_close(total, vectors[name.replace("_gs", "_summed")], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clipping", ["flat", "auto", "per_layer"])
def test_no_unit_adds_more_than_the_bound(clipping):
    rows = each(gradients(), clipping)
    norms = rows.double().norm(dim=1)
    assert norms.max() <= 1.5 * (1 + 1e-6)
    assert norms[-1] > 1.4  # the bound is used up
    total = torch.cat([part.flatten() for part in clip_per_unit(gradients(), 1.5, clipping).summed.values()])
    torch.testing.assert_close(rows.sum(0), total)


def test_factors():
    grads = {"a": torch.tensor([[3.0, 0.0], [0.3, 0.0]]), "b": torch.tensor([4.0, 0.4])}
    flat, norms = clip_per_unit(grads, 1.0)
    torch.testing.assert_close(norms, torch.tensor([5.0, 0.5]))
    torch.testing.assert_close(flat["a"], torch.tensor([0.9, 0.0]))
    automatic = clip_per_unit(grads, 1.0, "auto").summed
    torch.testing.assert_close(automatic["b"], torch.tensor(4 / 5.01 + 0.4 / 0.51))
    layers, norms = clip_per_unit(grads, 1.0, "per_layer")
    torch.testing.assert_close(norms, torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    torch.testing.assert_close(layers["b"], torch.tensor(math.sqrt(0.5) + 0.4))


@pytest.mark.parametrize("clipping", ["flat", "auto", "per_layer"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_units_that_are_not_finite_are_left_out(clipping, bad):
    grads = gradients()
    others = {name: gradient[[0, 1, 2, 4, 5]] for name, gradient in grads.items()}
    grads["matrix"][3, 2, 1] = bad
    found, wanted = clip_per_unit(grads, 1.0, clipping), clip_per_unit(others, 1.0, clipping)
    assert not found.norms[3].isfinite().all()
    for name in grads:  # all of them, although only one tensor overflowed
        torch.testing.assert_close(found.summed[name], wanted.summed[name])


def test_weights_come_before_the_norm():
    grads, weights = gradients(), torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 1e-4])
    scaled = {name: g * weights.view(-1, *[1] * (g.dim() - 1)) for name, g in grads.items()}
    for clipping in ("flat", "auto", "per_layer"):
        found, wanted = clip_per_unit(grads, 1.0, clipping, weights=weights), clip_per_unit(scaled, 1.0, clipping)
        torch.testing.assert_close(found.norms, wanted.norms)
        torch.testing.assert_close(found.summed, wanted.summed)


def test_structure_and_accumulation():
    grads = gradients()
    total = {name: torch.ones(gradient.shape[1:], dtype=torch.float64) for name, gradient in grads.items()}
    result = clip_per_unit(grads, 1.0, accumulate_into=total, dtype=torch.float64)
    assert result.summed is total and total["matrix"].dtype == torch.float64
    alone = clip_per_unit(tuple(grads.values()), 1.0).summed
    assert isinstance(alone, tuple) and isinstance(clip_per_unit(list(grads.values()), 1.0).summed, list)
    for name, value in zip(grads, alone, strict=True):
        torch.testing.assert_close(total[name] - 1, value.double(), atol=1e-6, rtol=1e-6)


def test_sums_in_float64_do_not_depend_on_the_split():
    grads = {"w": gradients(units=64)["matrix"]}

    def in_parts(size):
        total = {"w": torch.zeros(7, 3, dtype=torch.float64)}
        for start in range(0, 64, size):
            part = {"w": grads["w"][start : start + size]}
            clip_per_unit(part, 1.0, accumulate_into=total, dtype=torch.float64)
        return total["w"].float()

    assert torch.equal(in_parts(4), in_parts(64)) and torch.equal(in_parts(4), in_parts(16))


def test_norms_of_long_gradients_are_not_too_small():
    """A single float32 sum over these lost 2e-4 of the norm on the CPU, and the bound was exceeded by as much."""
    gradient = torch.ones(1, 2**22 + 5)
    (total,), norms = clip_per_unit([gradient], 1.0)
    assert abs(float(norms[0]) / math.sqrt(2**22 + 5) - 1) < 1e-6
    assert float(total.double().norm()) <= 1 + 1e-6


def test_low_precision_gradients():
    grads = {"w": torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).bfloat16()}
    summed, norms = clip_per_unit(grads, 1.0)
    assert summed["w"].dtype == norms.dtype == torch.float32
    torch.testing.assert_close(norms, grads["w"].float().norm(dim=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_norm": 0.0}, "finite number above 0, got 0.0.*no .epsilon, delta. holds"),
        ({"max_norm": math.inf}, "finite number"),
        ({"max_norm": math.nan}, "finite number"),
        ({"max_norm": True}, "finite number"),
        ({"clipping": "adaptive"}, "'flat', 'auto', 'per_layer'.*'adaptive'"),
        ({"grads": {}}, "at least one tensor, got dict without any"),
        ({"grads": 3}, "got int"),
        ({"grads": [torch.ones(2, 3), torch.ones(3, 3)]}, "same number of units"),
        ({"grads": [torch.ones(2, 3).long()]}, "floating"),
        ({"weights": torch.ones(3)}, r"shape \(2,\); got \(3,\)"),
        ({"accumulate_into": [torch.zeros(2, 3)]}, r"shapes \[\(3,\)\].*got \[\(2, 3\)\]"),
    ],
)
def test_bad_input(change, message):
    arguments = {"grads": [torch.ones(2, 3)], "max_norm": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        clip_per_unit(**arguments)
