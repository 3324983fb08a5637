"""Packed codes: the layout of the format, and that nothing is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfnoise.quantization import grid_for, pack, packed_length, unpack

WIDTHS = [1, 1.58, 2, 3, 4, 5, 6, 7, 8]


@given(st.sampled_from(WIDTHS), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 70), st.integers(0, 2**31))
def test_round_trip(bits, leading, length, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(grid_for(bits).levels, (*leading, length), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*leading, packed_length(length, bits))
    assert torch.equal(unpack(packed, bits, length), codes)
    held = unpack(packed, bits)  # and what may fill the last byte
    assert torch.equal(held[..., :length], codes) and not held[..., length:].any()
    assert held.shape[-1] == length or length % (5 if bits == 1.58 else 8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_it_is_a_little_endian_stream(bits):
    codes = torch.randint(2**bits, (13,), generator=torch.Generator().manual_seed(bits))
    stream = sum(code << (bits * place) for place, code in enumerate(codes.tolist()))
    expected = stream.to_bytes(-(-13 * bits // 8), "little")
    assert bytes(pack(codes, bits).tolist()) == expected


def test_five_ternary_digits_a_byte():
    assert pack(torch.tensor([2, 1, 0, 0, 1, 2, 2, 2, 2, 2, 1]), 1.58).tolist() == [2 + 3 + 81, 242, 1]


def test_nothing_to_pack():
    assert pack(torch.zeros(0, 5, dtype=torch.uint8), 3).shape == (0, 2)
    assert unpack(torch.zeros(4, 0, dtype=torch.uint8), 1.58, 0).shape == (4, 0)


@pytest.mark.slow
def test_shapes_alone():
    meta = pack(torch.zeros(4, 16, dtype=torch.uint8, device="meta"), 1)
    assert meta.shape == (4, 2) and unpack(meta, 1, 16).shape == (4, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_only_integers(dtype):
    with pytest.raises(TypeError, match="give integers"):
        pack(torch.ones(8, dtype=dtype), 1)


@pytest.mark.parametrize(("bits", "code"), [(1, 2), (1.58, 3), (3, 8), (4, -1), (8, 256)])
def test_codes_that_do_not_fit(bits, code):
    with pytest.raises(ValueError, match=f"{bits} bits hold 0 to {grid_for(bits).levels - 1}"):
        pack(torch.tensor([0, code]), bits)


def test_what_pack_does_not_write_is_refused():
    packed = pack(torch.ones(2, 9, dtype=torch.uint8), 1)
    with pytest.raises(TypeError, match="uint8"):
        unpack(packed.to(torch.int32), 1, 9)
    for length in (8, 17):
        with pytest.raises(ValueError, match=f"{length} codes of 1 bits take"):
            unpack(packed, 1, length)
    with pytest.raises(ValueError, match="beyond length=9"):
        unpack(packed + 128, 1, 9)
    with pytest.raises(ValueError, match="at most 242"):
        unpack(torch.tensor([243], dtype=torch.uint8), 1.58, 5)
    with pytest.raises(ValueError, match="0 or more"):
        unpack(packed, 1, -1)
    with pytest.raises(ValueError, match="no dimension"):
        pack(torch.tensor(1), 1)
