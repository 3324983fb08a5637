"""Tensors of any shape, dtype, layout and size: equal to a slow float64 truth, finite, in the dtype that was given."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfnoise.guidance import cosine_similarity, projected_update
from hfnoise.guidance.zero_star import zero_star_scale
from hfnoise.preference.dr_dpo import dr_dpo_weights
from hfnoise.preference.pair_context import PairContext
from hfnoise.preference.pair_loss_table import find_pair_loss, pair_loss_names
from hfnoise.privacy.clipping import clip_per_unit
from hfnoise.quantization import quantize
from hfnoise.quantization.hadamard import effective_hadamard_group, hadamard_matrix, hadamard_rotate

# That rows of an odd number of entries are not rotated is said once a process.
pytestmark = pytest.mark.filterwarnings("ignore:Rows of:UserWarning")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of a sum of a few hundred products, rounded once to the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CONTEXT = PairContext(flip_rate=0.2, beta=0.5)
LAYOUTS = ("plain", "transposed", "every second", "expanded", "offset")


def few(count):
    return settings(max_examples=count, derandomize=True, database=None, deadline=None)


def laid_out(x, layout):
    """Return the same numbers in another layout in memory."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "every second":
        return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "offset":
        return torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view_as(x)
    return x


@st.composite
def tensors(draw, largest=4):
    """Draw a matrix of normal numbers, some rows zero, of any dtype, layout and magnitude."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(1, 5)), draw(st.integers(1, 40)), generator=generator, dtype=torch.float64)
    x = x * 10.0 ** draw(st.integers(-largest, largest))
    if draw(st.booleans()):
        x[-1] = 0.0
    return laid_out(x.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(LAYOUTS)))


def check_rotation(x, group):
    size = effective_hadamard_group(x.shape[-1], group)
    matrix = hadamard_matrix(size, torch.float64)
    truth = (x.double().reshape(*x.shape[:-1], -1, size) @ matrix).reshape(x.shape)
    leaf = x.detach().clone().requires_grad_()
    for given_tensor in (x, leaf):
        found = hadamard_rotate(given_tensor, group)
        assert found.dtype == x.dtype and found.shape == x.shape and found.requires_grad == given_tensor.requires_grad
        scale = float(x.double().abs().max()) * math.sqrt(size) + 1e-300
        assert float((found.detach().double() - truth).abs().max()) <= TOLERANCE[x.dtype] * scale


def check_quantized(x, bits, estimator):
    found = quantize(x, bits, estimator)
    assert found.dtype == x.dtype and found.shape == x.shape and bool(found.isfinite().all())
    assert torch.equal(found, quantize(x.contiguous(), bits, estimator)), "the layout is no matter"
    zero = (x == 0).all(-1)
    assert not found[zero].any()


def check_guidance(cond, uncond):
    similarity = cosine_similarity(cond, uncond)
    a, b = cond.double(), uncond.double()
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    defined = norms > 0
    assert bool((similarity[defined].abs() <= 1 + 1e-6).all())
    truth = (a * b).sum(-1)[defined] / norms[defined]
    torch.testing.assert_close(similarity[defined].double(), truth, rtol=1e-4, atol=1e-4)
    update = projected_update(cond, uncond, eta=1.0).double()
    size = float(a.abs().max() + b.abs().max()) + 1e-300
    assert float((update - (a - b)).abs().max()) <= TOLERANCE[cond.dtype] * size
    projected = projected_update(cond, uncond, eta=0.0).double()
    assert bool(projected.isfinite().all())
    along = (projected * a).sum(-1).abs()
    assert bool((along <= 20 * TOLERANCE[cond.dtype] * size * a.norm(dim=-1) + 1e-30).all()), (
        "what is left is orthogonal"
    )
    scale = zero_star_scale(cond, uncond)
    assert bool(scale.isfinite().all()) and len(scale) == len(cond)


def check_clipped(x, clipping, max_norm):
    found = clip_per_unit([x], max_norm, clipping)
    (total,) = found.summed
    truth = x.double()
    norms = truth.norm(dim=-1, keepdim=True)
    factor = (max_norm / norms.clamp(min=1e-300)).clamp(max=1.0) if clipping == "flat" else max_norm / (norms + 0.01)
    expected = (truth * factor).sum(0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-3, atol=1e-4 * max_norm)
    assert float(total.double().norm()) <= len(x) * max_norm * (1 + 1e-5)


def check_guided(cond, seed):
    noise = torch.randn(cond.shape, generator=torch.Generator().manual_seed(seed)).to(cond.dtype)
    check_guidance(cond, cond + noise)


def check_pair_loss(values, dtype, name):
    margins = torch.tensor(values, dtype=dtype, requires_grad=True)
    losses = find_pair_loss(name).function(margins, CONTEXT)
    assert losses.dtype == dtype and losses.shape == margins.shape and bool(losses.isfinite().all())
    (gradient,) = torch.autograd.grad(losses.sum(), margins)
    assert bool(gradient.isfinite().all())
    one_by_one = torch.cat([find_pair_loss(name).function(m[None], CONTEXT) for m in margins])
    torch.testing.assert_close(losses, one_by_one, rtol=1e-6, atol=1e-6)


def check_dr_dpo(values, dr_beta):
    weights = dr_dpo_weights(torch.tensor(values), dr_beta).double()
    truth = torch.softmax(-torch.tensor(values, dtype=torch.float64) / dr_beta, 0)
    torch.testing.assert_close(weights, truth * weights.sum(), rtol=1e-2, atol=1e-5)


FLOATS = st.sampled_from([torch.float64, torch.float32])
# What is drawn for each check.
PROPERTIES = {
    check_rotation: (tensors(), st.sampled_from([1, 2, 8, 128])),
    check_quantized: (tensors(), st.sampled_from([1, 1.58, 2, 4, 8]), st.sampled_from(["quest", "ste", "ste_absmax"])),
    check_guided: (tensors(largest=2), st.integers(0, 2**31)),
    check_clipped: (tensors(), st.sampled_from(["flat", "auto"]), st.sampled_from([1e-3, 1.0, 100.0])),
    check_pair_loss: (
        st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6), FLOATS, st.sampled_from(sorted(pair_loss_names())),
    ),
    check_dr_dpo: (st.lists(st.floats(0, 1e3), min_size=1, max_size=8), st.floats(0.0115, 1e4)),
}  # fmt: skip


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_tensors(check):
    few(20)(given(*PROPERTIES[check])(check))()


@pytest.mark.soak
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_tensors_at_length(check):
    few(1000)(given(*PROPERTIES[check])(check))()
