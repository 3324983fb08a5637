"""Integer products of packed weights: every route equals int64 arithmetic, and the float product of the layers."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from hfnoise.quantization import row_quantizer as row_quantizers
from hfnoise.quantization.grids import grid_for
from hfnoise.quantization.kernels import bit_planes as kernels
from hfnoise.quantization.kernels import (
    integer_product,
    is_exact_in_float32,
    kernel_for,
    kernel_linear,
    level_sums,
    prepare_weight,
    products,
    route_for,
    status,
)
from hfnoise.quantization.kernels.library import LEVELS
from hfnoise.quantization.kernels.selection import library
from hfnoise.quantization.linear import LinearQuantization, QuestLinear
from hfnoise.quantization.linear_function import exact_product
from hfnoise.quantization.packing import pack
from hfnoise.quantization.row_quantizer import row_quantizer
from hfnoise.quantization.rows import decoded_rows, quantized_rows

LENGTHS = (1, 7, 8, 63, 64, 100, 128, 4096)
TOKENS = (1, 3, 17)
WIDTHS = [
    *product((1, 2), (1, 2)),
    *((bits, bits) for bits in (1.58, 3, 4, 5, 6, 7, 8)),
    (4, 1),
    (8, 2),
    (2, 8),
    (1, 1.58),
]
needs_compiled = pytest.mark.skipif(not status().compiled, reason=f"no compiled kernels: {status().reason}")


def random_codes(rows, length, bits, seed=0):
    """Return random codes whose first row is all lowest and whose last is all highest: the largest sums."""
    levels = grid_for(bits).levels
    codes = torch.randint(0, levels, (rows, length), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    codes[0] = 0
    codes[-1] = levels - 1
    return codes


def reference(codes_x, codes_w, activation_bits, weight_bits):
    """Return the product in int64."""
    x, w = (
        2 * codes.long() - (grid_for(bits).levels - 1)
        for codes, bits in ((codes_x, activation_bits), (codes_w, weight_bits))
    )
    return x @ w.T


def levels_here():
    """Return the levels of instructions that this machine has."""
    found = library()
    best = -1 if found is None else found.functions.hfnoise_best_level()
    return range(best + 1)


@pytest.mark.parametrize(("activation_bits", "weight_bits"), WIDTHS)
def test_every_route_is_exact(activation_bits, weight_bits):
    routes = {"float", route_for(weight_bits, activation_bits), route_for(4, 4)}
    for length, tokens in product(LENGTHS, TOKENS):
        codes_w = random_codes(19, length, weight_bits, seed=1)
        packed = pack(codes_w, weight_bits)
        codes_x = random_codes(tokens, length, activation_bits)
        expected = reference(codes_x, codes_w, activation_bits, weight_bits)
        for route in routes:
            weight = prepare_weight(packed, weight_bits, activation_bits, length, route)
            found = integer_product(codes_x, weight, weight_bits, activation_bits)
            assert found.dtype == torch.int32
            assert torch.equal(found.long(), expected), (route, length, tokens)


@needs_compiled
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rows", [1, 8, 19])
def test_every_level_of_instructions_is_exact(length, rows):
    for activation_bits, weight_bits, level, tokens in product((1, 2), (1, 2), levels_here(), TOKENS):
        codes_w = random_codes(rows, length, weight_bits, seed=1)
        compiled = replace(library(), level=level)
        planes = kernels.weight_planes(compiled, pack(codes_w, weight_bits), weight_bits, length)
        codes_x = random_codes(tokens, length, activation_bits)
        found = kernels.product(compiled, codes_x, activation_bits, planes, rows)
        assert torch.equal(found.long(), reference(codes_x, codes_w, activation_bits, weight_bits)), LEVELS[level]


@needs_compiled
def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "_WORTH_THREADS", 0)
    codes_x, codes_w = random_codes(5, 200, 1), random_codes(83, 200, 2, seed=1)
    weight = prepare_weight(pack(codes_w, 2), 2, 1, 200)
    expected = reference(codes_x, codes_w, 1, 2)
    for threads in (1, 2, 3, 64, 1000):  # of more than there are groups of rows, or than the kernel takes
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(integer_product(codes_x, weight, 2, 1).long(), expected)


@pytest.mark.parametrize(("activation_bits", "weight_bits"), [(1, 1), (2, 1), (4, 4), (8, 8)])
def test_strides_do_not_matter(activation_bits, weight_bits):
    codes_w = random_codes(12, 40, weight_bits, seed=1)
    wide = random_codes(6, 80, activation_bits)
    weight = prepare_weight(pack(codes_w, weight_bits).T.contiguous().T, weight_bits, activation_bits, 40)
    for codes_x in (
        wide[:, ::2],
        wide[:, 40:],
        wide[2:3, 40:],
        wide.T[:40].T,
        wide[:1, :40].as_strided((1, 40), (0, 1)),
    ):
        found = integer_product(codes_x, weight, weight_bits, activation_bits)
        assert torch.equal(found.long(), reference(codes_x, codes_w, activation_bits, weight_bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("activation_bits", "weight_bits"), [(1, 1), (2, 1), (1.58, 2), (4, 4), (6, 3)])
def test_bits_of_the_layers_product(activation_bits, weight_bits, dtype):
    # Long enough for the half precisions to round, and for float16 to need its power of two.
    length, levels = 1000, (grid_for(activation_bits).levels, grid_for(weight_bits).levels)
    codes_x, codes_w = random_codes(17, length, activation_bits), random_codes(24, length, weight_bits, seed=1)
    points = [
        decoded_rows(codes, count, None, torch.float32)
        for codes, count in zip((codes_x, codes_w), levels, strict=True)
    ]
    weight = prepare_weight(pack(codes_w, weight_bits), weight_bits, activation_bits, length)
    sums = integer_product(codes_x, weight, weight_bits, activation_bits)
    found = level_sums(sums, length, levels, dtype)
    expected = exact_product(*points, levels, dtype)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("activation_bits", "weight_bits"), [(1, 1), (2, 1), (1.58, 2), (4, 4)])
def test_bits_of_the_layer(activation_bits, weight_bits, dtype, monkeypatch):
    settings = LinearQuantization(weight_bits, activation_bits)
    layer = QuestLinear(192, 24, quantization=settings, dtype=dtype)
    x = torch.randn(40, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3] = 0
    x[4] = math.nan
    rows = quantized_rows(layer.weight, row_quantizer(layer.weight, weight_bits))
    weight = prepare_weight(pack(rows.codes, weight_bits), weight_bits, activation_bits, 192)
    monkeypatch.setattr(row_quantizers, "_BLOCK_ENTRIES", 192 * 16)  # more than one block
    expected = layer(x)
    found = kernel_linear(x, row_quantizer(x, activation_bits), weight, rows.step, layer.bias)
    assert found.dtype == dtype
    assert torch.equal(found[:4], expected[:4])
    assert torch.equal(found[5:], expected[5:])
    assert bool(found[4].isnan().all())
    assert bool(expected[4].isnan().all())
    assert kernel_linear(x[:0], row_quantizer(x, activation_bits), weight, rows.step).shape == (0, 24)
    without_bias = kernel_linear(x[5:], row_quantizer(x, activation_bits), weight, rows.step)
    layer.bias = None
    assert torch.equal(without_bias, layer(x[5:]))
    with pytest.raises(ValueError, match="settings have 256 levels"):
        kernel_linear(x, row_quantizer(x, 8), weight, rows.step)


def test_a_layer_whose_sums_round_is_refused():
    weight = prepare_weight(torch.zeros(1, 512, dtype=torch.uint8), 8, 8, 512)
    x = torch.ones(1, 512)
    with pytest.raises(ValueError, match="round in float32"):
        kernel_linear(x, row_quantizer(x, 8), weight, torch.ones(1, 1))


def test_nothing_to_do():
    packed = pack(random_codes(3, 64, 1), 1)
    assert integer_product(torch.zeros(0, 64, dtype=torch.uint8), packed, 1, 1).shape == (0, 3)
    assert integer_product(torch.zeros(2, 64, dtype=torch.uint8), packed[:0], 1, 1).shape == (2, 0)


def test_packed_rows_of_the_file_have_three_dimensions():
    codes_x, codes_w = random_codes(2, 20, 2), random_codes(4, 20, 2, seed=1)
    found = integer_product(codes_x, pack(codes_w, 2)[None], 2, 2)
    assert torch.equal(found.long(), reference(codes_x, codes_w, 2, 2))


def test_when_a_layer_may_use_a_kernel():
    longest = (2**24 - 1) // 225  # of 4 and 4 bits
    assert is_exact_in_float32(longest, 16, 16)
    assert not is_exact_in_float32(longest + 1, 16, 16)
    assert kernel_for(longest + 1, 4, 4) is None
    assert kernel_for(4096, 1, 1, "meta") is None
    expected_none = route_for(4, 4) == "float"
    assert (kernel_for(longest, 4, 4) is None) is expected_none
    kernel = kernel_for(100, 1, 1)
    if kernel is not None:
        codes_x, codes_w = random_codes(2, 100, 1), random_codes(3, 100, 1, seed=1)
        found = kernel(codes_x, prepare_weight(pack(codes_w, 1), 1, 1, 100))
        assert torch.equal(found.long(), reference(codes_x, codes_w, 1, 1))


def test_the_largest_sum_of_int32():
    # 33 025 products of 255 x 255 are the last that int32 holds.
    length = math.ceil(2**31 / 255**2) - 1
    codes = torch.full((1, length), 255, dtype=torch.uint8)
    for route in {"float", route_for(8, 8)}:
        found = integer_product(codes, prepare_weight(codes, 8, 8, length, route), 8, 8)
        assert found.item() == 255**2 * length
    with pytest.raises(ValueError, match="does not fit into int32"):
        prepare_weight(torch.zeros(1, length + 1, dtype=torch.uint8), 8, 8, length + 1)


PACKED = pack(random_codes(3, 20, 1), 1)
CODES = random_codes(2, 20, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: integer_product(CODES.int(), PACKED, 1, 1), TypeError, "torch.int32; give uint8"),
        (lambda: integer_product(CODES[0], PACKED, 1, 1), ValueError, r"shape \(20,\)"),
        (lambda: integer_product(CODES[:, :0], PACKED, 1, 1), ValueError, "at least one entry"),
        (lambda: integer_product(CODES, PACKED, 1, 0), ValueError, "bits is 0; allowed"),
        (lambda: integer_product(CODES, PACKED, 2, 1), ValueError, "take 5 bytes a row"),
        (lambda: integer_product(CODES, PACKED.int(), 1, 1), TypeError, "torch.int32"),
        (lambda: integer_product(CODES, PACKED[0], 1, 1), ValueError, "rows of bytes"),
        (lambda: integer_product(CODES + 1, PACKED, 1, 1), ValueError, "codes go up to 2; 1 bits hold 0 to 1"),
        (lambda: integer_product(CODES + 20, pack(CODES, 4), 4, 4), ValueError, "codes go up to 21; 4 bits"),
        (lambda: integer_product(CODES, PACKED | 255, 1, 1), ValueError, "codes beyond length=20"),
        (lambda: integer_product(CODES[:, :9], prepare_weight(PACKED, 1, 1, 20), 1, 1), ValueError, "rows of 9"),
        (lambda: integer_product(CODES, prepare_weight(PACKED, 1, 1, 20), 1, 2), ValueError, "prepared for weight"),
        (lambda: prepare_weight(PACKED, 1, 1, 0), ValueError, "length is 0"),
        (lambda: prepare_weight(PACKED, 1, 1, 20, "fast"), ValueError, "route is 'fast'"),
        (lambda: prepare_weight(pack(CODES, 4), 4, 4, 20, "bit_planes"), ValueError, "route is 'bit_planes'"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@needs_compiled
def test_a_wrong_library_is_found_out(monkeypatch):
    monkeypatch.setattr(kernels, "product", lambda *_: torch.zeros(7, 11, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="computes wrong products"):
        kernels.check_library(library())


def test_routes_are_the_documented_ones():
    assert {route_for(bits, bits) for bits in (1, 1.58, 2, 4, 8)} <= set(products.ROUTES)
