"""The grouped Hadamard rotation."""

import warnings

import pytest
import torch

from hfnoise.quantization import effective_hadamard_group, hadamard_matrix, hadamard_rotate
from hfnoise.quantization.hadamard import _WARNED_LENGTHS

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_it_is_orthonormal_and_symmetric(size, dtype, tolerance):
    matrix = hadamard_matrix(size, dtype)
    assert (matrix @ matrix.mT - torch.eye(size, dtype=dtype)).abs().max() <= tolerance
    assert torch.equal(matrix, matrix.mT)
    rotated = hadamard_rotate(torch.eye(size, dtype=dtype), size)  # by its Kronecker factors above 64
    assert (rotated - matrix).abs().max() <= tolerance


def test_it_is_the_official_matrix_before_rounding(vectors):
    assert torch.equal(hadamard_matrix(128).bfloat16().float(), vectors("constants")["had128"])


def test_groups_are_rotated_apart():
    x = torch.randn(3, 2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (x.view(3, 2, 3, 8) @ hadamard_matrix(8, torch.float64)).view(3, 2, 24)
    assert torch.allclose(hadamard_rotate(x), expected)
    assert torch.allclose(hadamard_rotate(x.mT.contiguous().mT), expected)  # rows that are not contiguous
    assert hadamard_rotate(x, None) is x


def test_twice_is_once_back_and_so_is_its_gradient():
    x = torch.randn(2, 256, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(hadamard_rotate(hadamard_rotate(x)), x)
    assert torch.autograd.gradcheck(hadamard_rotate, (x[:, :8], 8))
    assert torch.autograd.gradgradcheck(hadamard_rotate, (x[:, :8], 8))


@pytest.mark.parametrize(
    ("length", "bound", "group"),
    [(4096, 128, 128), (11008, 128, 128), (96, 128, 32), (64, 100, 64), (256, 512, 256), (256, 0, 1), (256, None, 1),
     (2, 128, 2), (1, 128, 1), (7, 1, 1)],
)  # fmt: skip
def test_the_group(length, bound, group):
    assert effective_hadamard_group(length, bound) == group


def test_odd_rows_warn_once():
    _WARNED_LENGTHS.discard(77)
    with pytest.warns(UserWarning, match="Rows of 77 entries"):
        assert effective_hadamard_group(77) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert effective_hadamard_group(77) == 1


def test_bad_input():
    with pytest.raises(ValueError, match="power of two"):
        hadamard_matrix(12)
    with pytest.raises(ValueError, match="positive number"):
        effective_hadamard_group(8, -4)
    for group in (True, 2.0, "8"):
        with pytest.raises(TypeError, match="whole number"):
            effective_hadamard_group(8, group)
    with pytest.raises(TypeError, match="torch.int64"):
        hadamard_rotate(torch.arange(4))
    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match="at least one entry"):
            hadamard_rotate(torch.zeros(shape))


def test_float32_inside_under_autocast_and_at_bfloat16():
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hadamard_rotate(x)
    assert torch.equal(inside, hadamard_rotate(x))
    assert torch.equal(hadamard_rotate(x.bfloat16()), hadamard_rotate(x.bfloat16().float()).bfloat16())


def test_a_matrix_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        hadamard_rotate(torch.ones(1, 512, dtype=torch.float64), 512)
    x = torch.ones(1, 512, dtype=torch.float64, requires_grad=True)
    hadamard_rotate(x, 512).sum().backward()
    assert x.grad[0, 0] == pytest.approx(512**0.5)
