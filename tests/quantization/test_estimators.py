"""What the estimators promise beyond the official code: one function for all uses, edges, dtypes, what is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hfnoise.quantization import decode, encode, grid_for, hadamard_rotate, quantize, quantize_with_mask
from hfnoise.quantization import row_quantizer as blocks

WIDTHS = [1, 1.58, 2, 3, 4, 5, 6, 7, 8]
ESTIMATORS = ["quest", "ste", "ste_absmax"]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_and_export_agree_to_the_bit(bits, estimator):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for shape, group in (((5, 256), 128), ((2, 3, 96), 128), ((4, 40), None), ((64,), 16)):
            x = normal(*shape, dtype=torch.float64).to(dtype)
            values, mask = quantize_with_mask(x, bits, estimator, group)
            codes, scale, encoded_mask = encode(x, bits, estimator, group)
            decoded = decode(codes, scale, bits, group, rotate_back=False, dtype=dtype)
            assert values.dtype == dtype and torch.equal(values, decoded)
            assert codes.dtype == torch.uint8 and int(codes.max()) < grid_for(bits).levels
            assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert scale.shape == (*shape[:-1], 1)
            assert torch.equal(encoded_mask, torch.ones_like(encoded_mask) if mask is None else mask)


def test_blocks_of_rows_change_nothing(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        for settings in ({}, {"hadamard_group": None}, {"hadamard_group": 32}, {"trust_radius": 0.3}):
            x, upstream = normal(11, 256).to(dtype), normal(11, 256, seed=1).to(dtype)
            results = []
            for entries in (2**17, 3 * 256):  # at once; 3, 3, 3 and 2 rows
                monkeypatch.setattr(blocks, "_BLOCK_ENTRIES", entries)
                leaf = x.clone().requires_grad_()
                values = quantize(leaf, 2, **settings)
                values.backward(upstream)
                results.append((values.detach(), leaf.grad, *encode(x, 2, **settings)))
            for whole, parts in zip(*results, strict=True):
                assert torch.equal(whole, parts)


@pytest.mark.parametrize("bits", WIDTHS)
def test_error_and_masked_fraction_on_a_normal(bits):
    # All quantiles of the normal: its averages without sampling error.
    x = torch.special.ndtri((torch.arange(2**17, dtype=torch.float64) + 0.5) / 2**17)[None]
    values, mask = quantize_with_mask(x, bits, hadamard_group=None)
    scale = encode(x, bits, hadamard_group=None).scale
    rms = x.square().mean(-1, keepdim=True).sqrt()
    assert (scale / rms).item() == pytest.approx(grid_for(bits).step, rel=1e-12)
    error = {1: 0.3633802, 1.58: 0.1901740, 2: 0.1188461, 3: 0.03743966, 4: 0.01154288, 5: 3.495211e-3,
             6: 1.040045e-3, 7: 3.043328e-4, 8: 8.768619e-5}[bits]  # fmt: skip
    masked = {1: 0.2996, 1.58: 0.0664, 2: 0.0464, 3: 0.0191, 4: 0.0073, 5: 0.0026, 6: 0.00087, 7: 0.00027, 8: 8e-5}[
        bits
    ]
    tolerance = 0.002 if bits < 6 else 0.025  # few of the quantiles lie beyond the outermost level
    assert ((values - x) / rms).square().mean().item() == pytest.approx(error, rel=tolerance)
    assert 1 - mask.double().mean().item() == pytest.approx(masked, rel=0.02, abs=1e-5)


def test_rotation_cancels_in_a_linear_layer():
    x, weight = normal(8, 256), normal(16, 256, seed=1)
    product = F.linear(quantize(x, 8), quantize(weight, 8))
    assert (product - F.linear(x, weight)).abs().max() < 0.05 * 16  # 16 = standard deviation of an entry
    codes, scale, _ = encode(x, 8)
    assert torch.equal(decode(codes, scale, 8), hadamard_rotate(quantize(x, 8)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_edge_rows(estimator):
    x = torch.stack(
        [torch.zeros(64), torch.full((64,), 1e-12), normal(64) * 1e-12, normal(64) * 1e15, -torch.zeros(64)]
    )
    for bits in (1, 1.58, 4):
        leaf = x.clone().requires_grad_()
        values = quantize(leaf, bits, estimator)
        values.sum().backward()
        assert values.isfinite().all() and values[[0, 4]].abs().max() == 0
        values = values.detach()
        assert (values[2].square().mean() / x[2].square().mean()).sqrt() == pytest.approx(
            1, abs=0.8 if estimator != "ste_absmax" else 3
        )
        assert leaf.grad.abs().amax(-1).min() > 0
        _, mask = quantize_with_mask(x, bits, "quest", trust_radius=0.01)
        assert mask[[0, 4]].all() and not mask[3].all()
    assert quantize(torch.zeros(0, 64), 1).shape == (0, 64) and encode(torch.zeros(0, 64), 1).codes.shape == (0, 64)


def test_ties_go_up_and_zero_is_positive_at_one_bit():
    x = torch.tensor([[1.0, -1.0, 0.0, -0.0]])
    assert encode(x, 1, hadamard_group=None).codes.tolist() == [[1, 0, 1, 1]]
    assert encode(x, 2, hadamard_group=None).codes.tolist()[0][2:] == [2, 2]
    assert encode(x, 1.58, hadamard_group=None).codes.tolist() == [[2, 0, 1, 1]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_invariances(bits):
    x = normal(32, 256)
    codes, scale, mask = encode(x, bits)
    for exponent in (-20, 3, 40):
        scaled = encode(x * 2.0**exponent, bits)
        assert torch.equal(scaled.codes, codes) and torch.equal(scaled.mask, mask)
        assert torch.equal(scaled.scale, scale * 2.0**exponent)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(encode(x[order], bits).codes, codes[order])
    assert torch.equal(encode(x.view(4, 8, 256), bits).codes.view(32, 256), codes)
    strided = x.mT.contiguous().mT
    assert not strided.is_contiguous() and torch.equal(quantize(strided, bits), quantize(x, bits))


def test_only_a_bool_mask_is_kept():
    kept = []

    def pack(tensor):
        kept.append((tensor.dtype, tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quantize(normal(4, 256).requires_grad_(), 2)
        quantize(normal(4, 256).requires_grad_(), 2, "ste")
    assert kept == [(torch.bool, (4, 256))]


def test_float32_inside_under_autocast():
    x, upstream = normal(4, 256), normal(4, 256, seed=1)
    gradients = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            values = quantize(leaf, 3)
            values.backward(upstream)
            codes = encode(x, 3).codes
        gradients.append((values.detach(), leaf.grad, codes))
    assert all(torch.equal(plain, autocast) for plain, autocast in zip(*gradients, strict=True))


@pytest.mark.slow  # its first use imports torch's compiler
def test_gradient_checkpointing_gives_equal_gradients():
    x, weight = normal(8, 128), normal(4, 128, seed=1)

    def layer(x, weight):
        return F.linear(quantize(x, 1), quantize(weight, 1))

    gradients = []
    for run in (layer, lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        gradients.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients, strict=True))


def test_a_second_derivative_is_refused():
    x = normal(2, 64).requires_grad_()
    (gradient,) = torch.autograd.grad(quantize(x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_torch_func_gives_the_gradient():
    x = normal(3, 64)
    leaf = x.clone().requires_grad_()
    quantize(leaf, 2).square().sum().backward()
    # Its tensors have no memory that a kernel could read: torch rotates them, and rounds otherwise.
    torch.testing.assert_close(torch.func.grad(lambda x: quantize(x, 2).square().sum())(x), leaf.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # inside torch.compile
@pytest.mark.parametrize(
    "settings",
    [{"bits": 1}, {"bits": 4, "hadamard_group": 32}, {"bits": 2, "estimator": "ste"}, {"bits": 1.58},
     {"bits": 2, "estimator": "ste_absmax"}, {"bits": 2, "trust_radius": 0.2, "hadamard_group": None}],
)  # fmt: skip
def test_compiled_without_a_graph_break(settings):
    x, upstream = normal(6, 256), normal(6, 256, seed=1)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: quantize(x, **settings) * 1.0, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, lambda x: quantize(x, **settings)):
        leaf = x.clone().requires_grad_()
        values = function(leaf)
        values.backward(upstream)
        results.append((values.detach(), leaf.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)  # kernel and torch: a few units in the last place


def test_bad_settings():
    x = normal(2, 64)
    with pytest.raises(ValueError, match="allowed are 1, 1.58"):
        quantize(x, 9)
    with pytest.raises(ValueError, match="'quest', 'ste', 'ste_absmax'"):
        quantize(x, 4, "lloyd")
    with pytest.raises(ValueError, match="call lsq_quantize"):
        quantize(x, 4, "lsq")
    for option in ("trust_factor", "trust_radius"):
        with pytest.raises(ValueError, match="passes every gradient"):
            quantize(x, 4, "ste", **{option: 1.0})
        with pytest.raises(ValueError, match="above 0"):
            quantize(x, 4, **{option: -1.0})
    with pytest.raises(ValueError, match="give one of them"):
        quantize(x, 4, trust_factor=1.0, trust_radius=1.0)
    with pytest.raises(TypeError, match="torch.int64"):
        quantize(torch.arange(4), 4)
    with pytest.raises(ValueError, match="at least one entry"):
        quantize(torch.zeros(3, 0), 4)


def test_rows_without_codes_are_refused():
    for value in (float("nan"), float("inf"), -float("inf")):
        x = normal(4, 64)
        x[2, 5] = value
        with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 4 rows \(2\)"):
            encode(x, 4)
        assert not quantize(x, 4)[2].isfinite().any()  # in training it shows in the loss
    with pytest.raises(ValueError, match="squares overflow"):
        encode(normal(4, 64) * 1e30, 1)
    encode(normal(4, 64, dtype=torch.float64) * 1e30, 1)


def test_what_encode_did_not_return_is_refused():
    codes, scale, _ = encode(normal(2, 64), 2)
    with pytest.raises(TypeError, match="what encode returned"):
        decode(codes.float(), scale, 2)
    for wrong in (scale[:, 0], scale[:1], scale.mT):
        with pytest.raises(ValueError, match=r"need \(2, 1\)"):
            decode(codes, wrong, 2)


def test_results_can_be_changed_in_place():
    x = torch.randn(2, 3, 64, requires_grad=True)
    for function in (lambda x: quantize(x, 2), hadamard_rotate):
        found = torch.autograd.grad(function(x).mul_(2).sum(), x)[0]
        assert torch.equal(found, torch.autograd.grad((function(x) * 2).sum(), x)[0])
