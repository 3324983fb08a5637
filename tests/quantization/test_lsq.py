"""Learned step sizes where the official code has no answer: one bit, ternary, other dtypes."""

import pytest
import torch

from hfnoise.quantization import lsq_initial_step, lsq_quantize


@pytest.mark.parametrize(("bits", "outermost", "largest_code"), [(1, 0.5, 0.5), (1.58, 1.0, 1.0), (3, 3.5, 3.0)])
def test_gradients_are_those_of_the_paper(bits, outermost, largest_code):
    x = torch.linspace(-5, 5, 41, dtype=torch.float64).add(0.01).requires_grad_()
    step = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    values = lsq_quantize(x, step, bits)
    levels = (values / step).detach()
    assert levels.abs().max() == pytest.approx(outermost)
    assert (levels - x.detach() / step.detach())[levels.abs() < outermost].abs().le(0.5).all()
    upstream = torch.linspace(1, 2, 41, dtype=torch.float64)
    values.backward(upstream)
    in_steps = x.detach() / 0.8
    inside = in_steps.abs() <= outermost
    assert torch.equal(x.grad, upstream * inside)
    slope = torch.where(inside, levels - in_steps, levels)
    assert step.grad.item() == pytest.approx((slope * upstream).sum().item() / (41 * largest_code) ** 0.5)


@pytest.mark.parametrize("rule", ["lsq", "rms"])
@pytest.mark.parametrize("bits", [1, 1.58, 2, 4, 8])
def test_a_step_can_be_learned_at_every_width(bits, rule):
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    step = lsq_initial_step(x, bits, rule).requires_grad_()
    first = (lsq_quantize(x, step, bits) - x).square().mean()
    optimizer = torch.optim.Adam([step], lr=0.02 * step.item())
    for _ in range(100):
        optimizer.zero_grad()
        error = (lsq_quantize(x, step, bits) - x).square().mean()
        error.backward()
        optimizer.step()
    assert error <= first * 1.05 and step.isfinite()  # Adam keeps moving by up to 2 %


def test_dtypes_and_shapes():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    step = torch.full((1,), 0.5, requires_grad=True)
    half = x.bfloat16().requires_grad_()
    values = lsq_quantize(half, step, 2)
    values.sum().backward()
    assert values.dtype == half.grad.dtype == torch.bfloat16 and step.grad.shape == (1,)
    assert torch.equal(values.float(), lsq_quantize(half.float(), step, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lsq_quantize(x, step, 2), lsq_quantize(x, step.detach(), 2))


def test_bad_input():
    x, step = torch.ones(4), torch.tensor(1.0)
    with pytest.raises(ValueError, match="allowed are"):
        lsq_quantize(x, step, 9)
    with pytest.raises(ValueError, match="one step per tensor"):
        lsq_quantize(x, torch.ones(4), 2)
    with pytest.raises(TypeError, match="no floating tensor"):
        lsq_quantize(x, 1.0, 2)
    with pytest.raises(ValueError, match="'lsq'"):
        lsq_initial_step(x, 2, "max")
    for wrong in (torch.zeros(4), torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match="zero throughout, empty or not finite"):
            lsq_initial_step(wrong, 2)
