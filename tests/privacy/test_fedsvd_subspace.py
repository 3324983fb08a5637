"""How A starts, and the refresh extension: the function of a layer must not change, its directions must."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfnoise.privacy import export_factors, initial_lora_A, refresh_lora, right_singular_rows
from hfnoise.privacy.lora_rotation import orthonormality_error


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def factors(rank=4, inputs=24, outputs=20, seed=0, dtype=torch.float64):
    generator = seeded(seed)
    lora_A = torch.randn(rank, inputs, generator=generator, dtype=dtype)
    return lora_A, torch.randn(outputs, rank, generator=generator, dtype=dtype)


def test_kaiming_is_pefts_default():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(1024, 8)), LoraConfig(r=64, target_modules=["0"]))
    peft_A = model.base_model.model[0].lora_A["default"].weight
    ours = initial_lora_A("kaiming", 64, 1024, generator=seeded())
    for lora_A in (peft_A, ours):
        assert 0.99 / 32 < lora_A.abs().max() <= 1 / 32
        assert lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * 1024), rel=0.01)
        # Below 1: the paper's reason for orthonormal rows does not hold for its own start.
        assert torch.linalg.matrix_norm(lora_A, 2).item() == pytest.approx((1 + 0.25) / math.sqrt(3), rel=0.03)


def test_orthonormal_start_is_seeded():
    first, again, other = (initial_lora_A("orthonormal", 8, 64, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert orthonormality_error(first) < 1e-6 and first.dtype == torch.float32


@pytest.mark.parametrize(("outputs", "inputs"), [(20, 12), (12, 20)])
def test_singular_vectors_of_the_base_weight(outputs, inputs):
    weight = torch.randn(outputs, inputs, generator=seeded())
    expected = torch.linalg.svd(weight.double()).Vh
    rows = initial_lora_A("w0_svd", 4, base_weight=weight)
    assert ((rows.double() * expected[:4]).sum(1).abs() - 1).abs().max() < 1e-6
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()
    later = right_singular_rows(weight, 3, skip=4)
    assert ((later * expected[4:7]).sum(1).abs() - 1).abs().max() < 1e-6
    assert orthonormality_error(torch.cat([rows.double(), later])) < 1e-6


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 6), replaced=st.integers(1, 6), seed=st.integers(0, 10**6), given_rows=st.booleans())
def test_refresh_keeps_the_function_and_changes_the_space(rank, replaced, seed, given_rows):
    replaced = min(rank, replaced)
    A, B = factors(rank, seed=seed)
    fresh = torch.randn(replaced, 24, generator=seeded(seed + 1), dtype=torch.float64)
    source = {"new_rows": fresh} if given_rows else {"generator": seeded(seed + 1)}
    new_A, new_B, folded = refresh_lora(A, B, replaced, **source)
    kept = rank - replaced
    assert (new_B @ new_A + folded.dense() - B @ A).abs().max() < 1e-12 * (B @ A).abs().max()
    assert orthonormality_error(new_A) < 1e-12 and not new_B[:, kept:].any()
    assert folded.rank == replaced
    # The strongest directions stay.
    values = torch.linalg.svdvals(B @ A)
    torch.testing.assert_close(new_B[:, :kept].norm(dim=0), values[:kept], atol=1e-6 * values[0].item(), rtol=0)
    # With the kept rows, new rows span what the given ones do.
    both = torch.linalg.matrix_rank(torch.cat([new_A, fresh]))
    assert both == rank


def test_refresh_with_the_next_singular_vectors_of_the_weight():
    weight = torch.randn(20, 24, generator=seeded())
    A, (_, B) = initial_lora_A("w0_svd", 4, base_weight=weight), factors(dtype=torch.float32)
    new_A, new_B, _ = refresh_lora(A, B, 4, new_rows=right_singular_rows(weight, 4, skip=4))
    torch.testing.assert_close(new_A.double(), right_singular_rows(weight, 4, skip=4), atol=1e-6, rtol=0)
    assert new_A.dtype == torch.float32 and not new_B.any()


def test_export_concatenates_or_truncates():
    A, B = factors()
    product = B @ A
    folds = []
    for seed in range(3):
        A, B, folded = refresh_lora(A, B, 4, generator=seeded(seed))
        folds.append(folded)
        B = factors(seed=seed + 10)[1] / (1 + seed)
        product = product + B @ A
    whole, error = export_factors(A, B, folds)
    assert whole.rank == 4 * (1 + 3) and error == 0
    torch.testing.assert_close(whole.dense(), product, atol=1e-10, rtol=0)
    cut, error = export_factors(A, B, folds, rank=6)
    values = torch.linalg.svdvals(product)
    assert cut.rank == 6 and error == pytest.approx(float(values[6:].norm()), rel=1e-9)
    assert float(torch.linalg.matrix_norm(cut.dense() - product)) == pytest.approx(error, rel=1e-9)


BAD_STARTS = {
    "pissa": ({"init_A": "pissa"}, "kaiming, orthonormal, w0_svd; got 'pissa'"),
    "rank": ({"rank": 0}, "rank must be a whole number"),
    "wide": ({"rank": 25}, "rank 25 and only 24 inputs"),
    "inputs": ({"inputs": None}, "inputs must be a whole number"),
    "global generator": ({"generator": None}, "needs a torch.Generator"),
    "weight": ({"base_weight": torch.ones(3, 24)}, "base_weight belongs to"),
    "no weight": ({"init_A": "w0_svd"}, "base_weight belongs to"),
    "two inputs": (
        {"init_A": "w0_svd", "generator": None, "base_weight": torch.ones(9, 9)}, "inputs=24, but base_weight has 9"
    ),
    "small weight": (
        {"init_A": "w0_svd", "generator": None, "base_weight": torch.ones(3, 24)}, "has 3 singular vectors"
    ),
    "quantised": (
        {"init_A": "w0_svd", "generator": None, "base_weight": torch.ones(24, 24, dtype=torch.uint8)}, "quantised base"
    ),
    "draws nothing": ({"init_A": "w0_svd", "base_weight": torch.eye(24)}, "draws nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STARTS)
def test_bad_starts(case):
    changes, message = BAD_STARTS[case]
    arguments = {"init_A": "orthonormal", "rank": 4, "inputs": 24, "generator": seeded(), **changes}
    with pytest.raises(ValueError, match=message):
        initial_lora_A(**arguments)


@pytest.mark.parametrize(
    ("replaced", "options", "message"),
    [
        (0, {"generator": seeded()}, "between 1 and the rank 4, got 0"),
        (5, {"generator": seeded()}, "between 1 and the rank 4, got 5"),
        (2, {}, "give one of the two"),
        (1, {"generator": seeded(), "new_rows": torch.ones(1, 24)}, "give one of the two"),
        (2, {"new_rows": torch.ones(1, 24)}, r"shape \(2, 24\), got \(1, 24\)"),
        (2, {"new_rows": torch.ones(2, 24)}, r"rows \[1\] of new_rows lie in the space"),
        (2, {"new_rows": torch.zeros(2, 24)}, r"rows \[0, 1\] of new_rows"),
    ],
)
def test_bad_refreshes(replaced, options, message):
    with pytest.raises(ValueError, match=message):
        refresh_lora(*factors(), replaced, **options)


def test_a_given_row_among_the_kept_ones_is_refused():
    A, B = factors()
    with pytest.raises(ValueError, match=r"rows \[0\] of new_rows lie in the space of the kept rows"):
        refresh_lora(A, B, 1, new_rows=refresh_lora(A, B, 1, generator=seeded()).lora_A[:1])
