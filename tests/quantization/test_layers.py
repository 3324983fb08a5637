"""QuestLinear and QuestPackedLinear as torch modules: dtypes, autocast, batches, copies, compilation, bad input."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hfnoise import QuestConfig
from hfnoise.quantization import LinearQuantization, QuestLinear, QuestPackedLinear, pack_weight
from hfnoise.quantization.hf_layers import QuestConv1D

WIDTHS = [1, 1.58, 2, 3, 4, 8]


def layer_of(bits, length=64, rows=24, activation_bits="same", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    activation_bits = bits if activation_bits == "same" else activation_bits
    quantization = LinearQuantization(bits, activation_bits, **settings)
    return QuestLinear(length, rows, dtype=dtype, quantization=quantization)


def packed_of(layer):
    made = QuestPackedLinear(layer.in_features, layer.out_features, quantization=layer.quantization)
    made.set_weight(layer.weight)
    made.bias = layer.bias
    return made


def inputs(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("activation_bits", ["same", None])
@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_layer_computes_the_same(bits, activation_bits):
    layer = layer_of(bits, activation_bits=activation_bits)
    packed = packed_of(layer)
    for shape in ((64,), (5, 64), (2, 3, 64), (0, 64)):
        x = inputs(*shape)
        assert torch.equal(layer(x), packed(x))
        assert layer(x).shape == (*shape[:-1], 24)
    x, y = (inputs(5, 64).requires_grad_() for _ in range(2))
    layer(x).square().sum().backward()
    packed(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert packed.weight.grad is None


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_forward_does_not_depend_on_the_split_of_a_batch(bits):
    layer, x = layer_of(bits, length=512, rows=96), inputs(64, 512)
    whole = layer(x)
    for size in (1, 3, 32):
        assert torch.equal(torch.cat([layer(part) for part in x.split(size)]), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_casts(dtype):
    layer, x = layer_of(4), inputs(5, 64)
    exact = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        cast, packed = layer(x), packed_of(layer)(x)
    assert cast.dtype == dtype
    # Codes are those of float32, so the result is its rounding: half a unit in the last place, and the bias.
    assert torch.equal(cast, packed)
    torch.testing.assert_close(cast.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    cast.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and bool(layer.weight.grad.any())
    assert layer.to(dtype)(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("bits", [1, 8])
def test_float16_does_not_overflow(bits):
    # 4096 products of levels up to 127.5 are 6.7e7, a thousand times what float16 holds.
    layer = layer_of(bits, length=4096, rows=4, hadamard_group=None)
    x = torch.ones(2, 4096) * 300  # whose squares overflow too
    x[:, ::2] = -300
    with torch.no_grad():
        layer.weight.copy_(torch.sign(x[:1]) * 0.02)
        layer.bias.zero_()
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.float16):
        under = layer(x)
    assert bool(under.isfinite().all()) and exact.abs().min() > 10000
    torch.testing.assert_close(under.float(), exact, rtol=2e-3, atol=0)
    half = copy.deepcopy(layer).half()
    torch.testing.assert_close(half(x.half()).float(), exact, rtol=5e-3, atol=0)


def test_float64_is_kept():
    layer, x = layer_of(4, dtype=torch.float64), inputs(5, 64).double().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.float64
    torch.testing.assert_close(y, copy.deepcopy(layer).float()(x.float()).double(), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float64


@pytest.mark.parametrize("way", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("kind", ["master", "packed", "conv1d", "lsq"])
def test_copies_and_pickles(kind, way):
    x = inputs(5, 64)
    layer = layer_of(2, estimator="lsq") if kind == "lsq" else layer_of(2)
    if kind == "packed":
        layer = packed_of(layer)
    elif kind == "conv1d":
        layer = QuestConv1D(24, 64, LinearQuantization(2, 2))
    y = layer(x)
    assert torch.equal(way(layer)(x), y)


def test_state_dict_round_trip():
    layer = layer_of(3)
    for made in (layer, packed_of(layer)):
        fresh = type(made)(64, 24, quantization=made.quantization)
        fresh.load_state_dict(made.state_dict())
        assert torch.equal(fresh(inputs(5, 64)), layer(inputs(5, 64)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_keep_the_scale_of_packed_weights(dtype):
    packed = packed_of(layer_of(4))
    scale = packed.weight_scale.clone()
    packed.to(dtype)
    assert torch.equal(packed.weight_scale, scale) and packed.weight_scale.dtype == torch.float32
    assert packed.bias.dtype == dtype
    assert packed.to("meta").weight_scale.is_meta


def test_rows_of_zeros_give_zeros_and_get_gradients():
    layer, x = layer_of(1), inputs(3, 64)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.bias.zero_()
    x[1] = 0
    x.requires_grad_()
    y = layer(x)
    assert not y[:, 0].any() and not y[1].any() and bool(y[0, 1:].any())
    y.sum().backward()
    assert bool(layer.weight.grad[0].any()) and bool(x.grad[1].any())
    assert torch.equal(packed_of(layer)(x), y)


def test_odd_lengths_are_not_rotated():
    with pytest.warns(UserWarning, match="(?i)63|odd|rotat"):
        layer = layer_of(2, length=63)
        y = layer(inputs(2, 63))
    unrotated = layer_of(2, length=63, hadamard_group=None)
    assert torch.equal(y, unrotated(inputs(2, 63)))
    assert torch.equal(packed_of(unrotated)(inputs(2, 63)), y)


@pytest.mark.parametrize("bits", [0, 9, 1.5, -1, True, "4", float("nan")])
def test_widths_outside_of_the_list(bits):
    for settings in (LinearQuantization(bits, None), LinearQuantization(4, bits)):
        with pytest.raises((ValueError, TypeError), match="1.58"):
            QuestLinear(8, 8, quantization=settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_packed(value):
    weight = torch.ones(4, 8)
    weight[2, 1] = value
    with pytest.raises(ValueError, match=r"1 of 4 rows \(2\)"):
        pack_weight(weight, LinearQuantization(4))


def test_wrong_shapes_and_types():
    layer = layer_of(4)
    for made in (layer, packed_of(layer)):
        with pytest.raises((RuntimeError, ValueError)):
            made(inputs(2, 32))
        for wrong in (inputs(2, 32), inputs(128), inputs(1, 128)):
            with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):  # the way of the kernels
                made(wrong)
        with pytest.raises(TypeError, match="float"):
            made(torch.ones(2, 64, dtype=torch.int64))
    with torch.no_grad(), pytest.raises(ValueError, match="on meta"):
        packed_of(layer)(torch.empty(2, 64, device="meta"))
    with pytest.raises(ValueError, match="two dimensions"):
        pack_weight(torch.ones(2, 3, 4), LinearQuantization(4))
    with pytest.raises(ValueError, match="no packed form"):
        QuestPackedLinear(8, 8, quantization=LinearQuantization(estimator="lsq"))


@pytest.mark.parametrize("shape", [(0, 64), (0, 5, 64), (3, 0, 64)])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_no_rows(shape, bits):
    layer = layer_of(bits)
    for made in (layer, packed_of(layer)):
        with torch.no_grad():
            assert made(torch.empty(shape)).shape == (*shape[:-1], layer.out_features)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_layer(packed):
    layer = layer_of(4)
    if packed:
        layer = packed_of(layer)
    x = inputs(5, 64)
    compiled = torch.compile(nn.Sequential(layer, nn.SiLU()), fullgraph=False, backend="aot_eager")
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = compiled(leaf), nn.functional.silu(layer(other))
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "magic"}, "estimator is 'magic'"),
        ({"estimator": "ste", "trust_factor": 1.3}, "trust_factor is read by"),
        ({"estimator": "lsq", "grid": "upstream"}, "learns its steps"),
        ({"hadamard_group": -1}, "hadamard_group is -1"),
    ],
)
def test_what_would_be_ignored_or_fail_later_is_refused_when_a_layer_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        QuestLinear(8, 8, quantization=LinearQuantization(**settings))
    with pytest.raises(ValueError, match=message):
        QuestConv1D(8, 8, LinearQuantization(**settings))
    with pytest.raises(ValueError, match=message):
        QuestConfig(bits=2, **settings)
