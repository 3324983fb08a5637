"""Rows on the grid: the compiled kernel beside torch, and every level of instructions beside the plainest."""

import pytest
import torch

from hfnoise.quantization import LinearQuantization, QuestPackedLinear, decode, encode, quantize, rows
from hfnoise.quantization.kernels import rows as kernel
from hfnoise.quantization.kernels.library import LEVELS, load
from hfnoise.quantization.kernels.selection import library
from hfnoise.quantization.row_quantizer import row_quantizer

needs_kernels = pytest.mark.skipif(library() is None, reason="no compiled kernels on this machine")
BITS = (1, 1.58, 2, 3, 5, 8)


def hard_rows(count, length):
    x = torch.randn(count, length, generator=torch.Generator().manual_seed(length))
    x[0] = 0  # dead
    x[1] *= 1e-30  # squares vanish
    x[2, 3] = 1e6  # an outlier
    return x


@needs_kernels
@pytest.mark.parametrize("length", [16, 48, 96, 128, 1024])
@pytest.mark.parametrize("bits", BITS)
def test_kernel_equals_torch(monkeypatch, bits, length):
    x, gradient = hard_rows(37, length), torch.randn(37, length, generator=torch.Generator().manual_seed(1))
    settings = row_quantizer(x, bits)
    fast = rows.quantized_rows(x, settings)
    fast_gradient = rows.masked_and_rotated(gradient, fast.mask, settings.group)
    monkeypatch.setattr(rows, "library", lambda: None)
    slow = rows.quantized_rows(x, settings)
    torch.testing.assert_close(fast.step, slow.step, rtol=1e-6, atol=0)
    # Sums are rounded in another order: an entry within rounding of a threshold may fall on its other side.
    assert (fast.codes != slow.codes).sum() + (fast.mask != slow.mask).sum() <= 2
    assert torch.equal(fast.codes - (settings.levels - 1) / 2, fast.points)
    slow_gradient = rows.masked_and_rotated(gradient, fast.mask, settings.group)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-6, atol=2e-6)


@needs_kernels
@pytest.mark.parametrize("group", [1, 16, 32, 64, 128])
def test_all_levels_of_instructions_give_the_same_bits(group):
    x = hard_rows(11, 256)
    settings = row_quantizer(x, 4, hadamard_group=group)
    found = []
    for level in range(library().level + 1):
        functions = load(library().path, level)
        points, codes = torch.empty_like(x), torch.empty(x.shape, dtype=torch.uint8)
        mask = torch.empty(x.shape, dtype=torch.bool)
        step = kernel.quantize(functions, x, settings, points, False, codes, mask)
        found.append(
            (points, codes, mask, step, kernel.rotate_gradients(functions, x, mask, group, torch.empty_like(x)))
        )
    for level, other in zip(LEVELS, found, strict=False):
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True)), level


@needs_kernels
def test_threads_change_nothing(monkeypatch):
    x = hard_rows(200, 1024)
    one = rows.quantized_rows(x, row_quantizer(x, 2))
    monkeypatch.setattr(kernel, "_threads", lambda x: 3)
    other = rows.quantized_rows(x, row_quantizer(x, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("length", [128, 100])
def test_rows_that_are_not_finite_say_so(bad, length):
    x = torch.ones(3, length)
    x[1, 5] = bad
    values = quantize(x, 2)
    assert not values[1].isfinite().any() and values[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [128, 100])
def test_codes_are_those_of_training(dtype, length):
    x = hard_rows(7, length).clamp(-100, 100).to(dtype)
    for bits in BITS:
        codes, scale, _ = encode(x, bits)
        assert torch.equal(decode(codes, scale, bits, rotate_back=False).to(dtype), quantize(x, bits))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_defaults_of_torch_change_nothing(default):
    """C writes float32 on the CPU: into a tensor of another dtype it would be nonsense, or beyond its end."""
    x, layer = torch.randn(4096, 64), QuestPackedLinear(64, 8, quantization=LinearQuantization(1, 1))
    layer.set_weight(torch.randn(8, 64))
    results = []
    for dtype, device in ((torch.float32, "cpu"), (default, "meta")):
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device), torch.no_grad():
                codes, scale, _ = encode(x, bits=2)
                results.append((codes, scale, decode(codes, scale, bits=2), layer(x)))
        finally:
            torch.set_default_dtype(torch.float32)
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
