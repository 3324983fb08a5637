"""FedSVD's rotation: the golden vectors, the degenerate cases, and what must not change."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfnoise.privacy import rotate_lora
from hfnoise.privacy.lora_rotation import orthonormal_rows, orthonormality_error
from tests.privacy.lora_models import load_vectors

KINDS = ["generic", "decaying", "zero", "rank_deficient"]


def random_factors(rank=4, inputs=24, outputs=20, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(rank, inputs, generator=generator, dtype=dtype)
    return lora_A, torch.randn(outputs, rank, generator=generator, dtype=dtype)


def projector(lora_A):
    """Return the projector onto the space that the rows span."""
    rows = torch.linalg.qr(lora_A.double().mT).Q
    return rows @ rows.mT


@pytest.mark.parametrize("case", ["c0", "c1"])
@pytest.mark.parametrize("kind", KINDS)
def test_golden_vectors(case, kind):
    vectors = load_vectors("fedsvd_reinit")
    A, B, A_out, B_out = (vectors[f"{case}_{kind}_{name}"] for name in ("A", "B", "A_out", "B_out"))
    new_A, new_B, rotation = rotate_lora(A, B)
    torch.testing.assert_close(new_B @ new_A, B_out @ A_out, atol=1e-6, rtol=1e-6)
    assert orthonormality_error(new_A) < 1e-6
    torch.testing.assert_close(new_B.norm(dim=0), B_out.norm(dim=0), atol=1e-5, rtol=1e-5)
    if kind in ("generic", "decaying"):
        assert ((new_A * A_out).sum(1).abs() - 1).abs().max() < 1e-5
    # What the official code loses in the degenerate cases.
    torch.testing.assert_close(projector(new_A), projector(A), atol=2e-6, rtol=0)
    assert new_A.dtype == new_B.dtype == torch.float32 and rotation.dtype == torch.float64


@settings(deadline=None, max_examples=40)
@given(
    rank=st.integers(1, 6), inputs=st.integers(6, 20), outputs=st.integers(1, 20), seed=st.integers(0, 10**6),
    exponent=st.integers(-12, 12), lost=st.integers(0, 6),
)  # fmt: skip
def test_any_factors(rank, inputs, outputs, seed, exponent, lost):
    A, B = random_factors(rank, inputs, outputs, torch.float64, seed)
    B[:, :lost] = B[:, -1:]  # dependent columns
    B *= 10.0**exponent
    new_A, new_B, rotation = rotate_lora(A, B)
    size = (B @ A).abs().max()
    assert (new_B @ new_A - B @ A).abs().max() <= 1e-12 * size
    assert orthonormality_error(new_A) < 1e-12 and orthonormality_error(rotation) < 1e-12
    norms = new_B.norm(dim=0)
    values = torch.linalg.svdvals(B @ A)[:rank]
    # A Gram matrix knows singular values to the square root of the precision, relative to the largest.
    assert (norms[: len(values)] - values).abs().max() <= 1e-7 * values[0]
    assert (norms.diff() <= 1e-7 * norms[0]).all()
    pivots = new_B.gather(0, new_B.abs().argmax(0, keepdim=True))[0]
    assert (pivots[norms > 1e-6 * norms[0]] > 0).all()
    torch.testing.assert_close(new_A, rotation.mT @ orthonormal_rows(A)[0], atol=1e-12, rtol=0)


def test_rotation_is_relative_to_orthonormal_rows():
    A, B = random_factors()
    A = orthonormal_rows(A)[0].float()
    new_A, new_B, rotation = rotate_lora(A, B)
    torch.testing.assert_close(new_A, (rotation.mT @ A.double()).float(), atol=0, rtol=0)
    torch.testing.assert_close(new_B, (B.double() @ rotation).float(), atol=0, rtol=0)


def test_zero_B_is_not_rotated():
    A, B = random_factors()
    A = orthonormal_rows(A)[0].float()
    new_A, new_B, rotation = rotate_lora(A, torch.zeros_like(B))
    assert torch.equal(new_A, A) and torch.equal(new_B, torch.zeros_like(B))
    assert torch.equal(rotation, torch.eye(4, dtype=torch.float64))


def test_it_is_deterministic_and_a_fixed_point():
    A, B = random_factors(seed=3)
    first, second = rotate_lora(A, B), rotate_lora(A, B)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    again = rotate_lora(first.lora_A, first.lora_B)
    torch.testing.assert_close(again.rotation, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_thousand_rotations_do_not_drift():
    A, B = random_factors(8, 64, 48)
    product, start = B @ A, projector(A)
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        # Another order of the directions each time, so that rotations are not the identity.
        mixed = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
        A, B, _ = rotate_lora(mixed @ A, B @ mixed.mT)
    assert orthonormality_error(A) < 1e-6
    torch.testing.assert_close(projector(A), start, atol=1e-5, rtol=0)
    torch.testing.assert_close(B @ A, product, atol=1e-4, rtol=1e-4)


def test_rows_that_drifted_are_made_orthonormal_again():
    A, B = random_factors()
    A = orthonormal_rows(A)[0].float() * (1 + 4e-6)
    new_A, new_B, _ = rotate_lora(A, B)
    assert orthonormality_error(A) > 7e-6 and orthonormality_error(new_A) < 2e-7
    torch.testing.assert_close(new_B @ new_A, B @ A, atol=1e-6, rtol=1e-6)


def test_dependent_rows_of_A():
    A, B = random_factors()
    A[2] = A[0]
    new_A, new_B, _ = rotate_lora(A, B)
    assert orthonormality_error(new_A) < 1e-6
    torch.testing.assert_close(new_B @ new_A, B @ A, atol=2e-6, rtol=1e-6)


def test_parameters_are_left_alone():
    A, B = (torch.nn.Parameter(factor) for factor in random_factors())
    kept = A.detach().clone(), B.detach().clone()
    new_A, new_B, _ = rotate_lora(A, B)
    assert torch.equal(A, kept[0]) and torch.equal(B, kept[1])
    assert not (new_A.requires_grad or new_B.requires_grad)
    zero_A, zero_B, _ = rotate_lora(A, torch.nn.Parameter(torch.zeros_like(B)))
    zero_A.add_(1), zero_B.add_(1)
    assert torch.equal(A, kept[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda A, B: (A.bfloat16(), B.bfloat16()), TypeError, "bfloat16.*Keep adapters in float32"),
        (lambda A, B: (A.half(), B.half()), TypeError, "float16"),
        (lambda A, B: (A.double(), B), TypeError, "float64 and torch.float32"),
        (lambda A, B: (A.numpy(), B), TypeError, "ndarray"),
        (lambda A, B: (A, B[:, :3]), ValueError, r"\(4, 24\) and \(20, 3\)"),
        (lambda A, B: (A[0], B), ValueError, "shapes"),
        (lambda A, B: (A[:0], B[:, :0]), ValueError, "shapes"),
        (lambda A, B: (A[:, :3], B), ValueError, "rank 4 and only 3 inputs"),
        (lambda A, B: (A, B * float("nan")), ValueError, "lora_B holds 80 values that are not finite"),
        (lambda A, B: (A.index_fill(1, torch.tensor([0]), float("inf")), B), ValueError, "lora_A holds 4 values"),
        (lambda A, B: (A.double(), B.double() * 1e200), ValueError, "overflow"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        rotate_lora(*change(*random_factors()))


def fastest(function, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.slow
def test_it_is_fast():
    A, B = random_factors(8, 1024, 1024)
    A = orthonormal_rows(A)[0].float()
    ours = fastest(lambda: rotate_lora(A, B), 200)
    full = fastest(lambda: torch.linalg.svd(B @ A, full_matrices=False), 1)
    assert ours <= 0.3e-3 and full >= 100 * ours
