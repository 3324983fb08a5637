"""Draws are what they say: a function of key, label, step and position; sampling is Poisson everywhere alike."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfnoise.privacy.keyed_random import KeyedRandom
from hfnoise.privacy.sampling import PoissonSampler, micro_batches
from hfnoise.privacy.secret_file import load_or_create_secret, run_key, secret_name, unsafe_secret

RANDOM = KeyedRandom(bytes(range(32)))


def test_uniforms_by_hand():
    """SHAKE-256(key | length of label | label | step | block), 53 bits of each 8 bytes, little-endian."""
    header = (6).to_bytes(4, "big") + b"sample" + (7).to_bytes(8, "big") + (0).to_bytes(8, "big")
    raw = hashlib.shake_256(bytes(range(32)) + header).digest(24)
    words = [int.from_bytes(raw[i : i + 8], "little") >> 11 for i in (0, 8, 16)]
    assert RANDOM.uniforms("sample", 7, 3).tolist() == [(word + 0.5) * 2.0**-53 for word in words]


def test_a_draw_depends_on_its_place_alone():
    long = RANDOM.uniforms("noise", 3, 140_000)  # more than a block
    assert torch.equal(RANDOM.uniforms("noise", 3, 1000), long[:1000])
    for other in (RANDOM.uniforms("noise", 4, 1000), RANDOM.uniforms("noise2", 3, 1000)):
        assert not torch.isin(other, long).any()
    assert not torch.isin(long[:1000], long[131_072:132_072]).any()


def test_the_normals_are_normal():
    x = RANDOM.normals("noise", 0, 200_000)
    assert x.dtype == torch.float64 and torch.isfinite(x).all()
    assert abs(x.mean()) < 4 / math.sqrt(200_000) and abs(x.var() - 1) < 4 * math.sqrt(2 / 200_000)
    edges = torch.linspace(-3, 3, 25, dtype=torch.float64)
    distance = [(x <= edge).double().mean() - torch.special.ndtr(edge) for edge in edges]
    assert max(abs(d) for d in distance) < 1.95 / math.sqrt(200_000)  # Kolmogorov-Smirnov at 0.1 %
    assert abs((x[1:] * x[:-1]).mean()) < 4 / math.sqrt(200_000)


def test_seeds():
    seeds = RANDOM.seeds("forward", 3, 1000)
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**62 for seed in seeds) and max(seeds) > 2**61
    assert RANDOM.seeds("forward", 3, 4) == seeds[:4] != RANDOM.seeds("forward", 4, 4)
    with pytest.raises(ValueError, match="at least 0"):
        RANDOM.seeds("forward", -1, 1)


@pytest.mark.parametrize("arguments", [("x", -1, 1), ("x", 0, -1)])
def test_bad_steps_and_counts(arguments):
    with pytest.raises(ValueError, match="at least 0"):
        RANDOM.uniforms(*arguments)
    with pytest.raises(ValueError, match="32 bytes"):
        KeyedRandom(b"short")


def test_poisson_batches():
    """Sizes are binomial and inclusions independent: the counts have the mean and variance of the law."""
    sampler = PoissonSampler(units=400, sample_rate=0.05)
    batches = [sampler.batch(RANDOM, step) for step in range(600)]
    sizes = torch.tensor([float(batch.numel()) for batch in batches])
    assert abs(sizes.mean() - 20) < 4 * math.sqrt(19 / 600) and abs(sizes.var() / 19 - 1) < 4 * math.sqrt(2 / 600)
    times = torch.bincount(torch.cat(batches), minlength=400).double()
    assert abs(times.mean() - 30) < 0.6 and abs(times.var() / 28.5 - 1) < 4 * math.sqrt(2 / 400)
    assert all(torch.equal(batch, batch.unique()) for batch in batches[:50])


def test_a_small_rate_is_not_rounded():
    """float32 turns 1e-7 into 1.19e-7: with 2e8 draws the difference would be 38 hits against 20 expected."""
    u = torch.tensor([1.1e-7], dtype=torch.float64)
    assert not bool(u < 1e-7) and RANDOM.uniforms("x", 0, 1).dtype == torch.float64


def test_cyclic_groups():
    """Each unit takes part at most once in `bands` steps, and the groups are drawn unit by unit."""
    sampler = PoissonSampler(units=300, sample_rate=0.1, bands=5)
    groups = sampler.groups(RANDOM)
    assert sorted(groups.unique().tolist()) == [0, 1, 2, 3, 4] and len(set(torch.bincount(groups).tolist())) > 1
    for step in range(20):
        assert (groups[sampler.batch(RANDOM, step)] == step % 5).all()
    sizes = torch.tensor([float(sampler.batch(RANDOM, step).numel()) for step in range(200)])
    assert abs(sizes.mean() - 30) < 2


@pytest.mark.parametrize("arguments", [(0, 0.5), (10, 0.0), (10, 1.1), (10, float("nan")), (10, 0.5, 3), (10, 0.5, 0)])
def test_rates_out_of_range(arguments):
    with pytest.raises(ValueError):
        PoissonSampler(*arguments)


@settings(max_examples=40)
@given(count=st.integers(0, 40), size=st.integers(1, 7), world_size=st.integers(1, 5))
def test_dealing_out(count, size, world_size):
    """All units once, the same micro-batches for every number of processes, as many for each."""
    chosen = torch.arange(count) * 3
    parts = [micro_batches(chosen, size, rank, world_size) for rank in range(world_size)]
    assert len({part.shape for part in parts}) == 1 and parts[0].shape[0] >= 1
    whole = {tuple(row.tolist()) for row in micro_batches(chosen, size)}
    dealt = [tuple(row.tolist()) for part in parts for row in part]
    empty = (-1,) * size
    assert whole - {empty} == set(dealt) - {empty}
    assert sorted(unit for row in dealt for unit in row if unit >= 0) == chosen.tolist()


def test_keys_of_runs(tmp_path):
    secret = load_or_create_secret(tmp_path / "new" / "key", tmp_path / "out")
    assert len(secret) == 32 and secret != load_or_create_secret(tmp_path / "other", tmp_path / "out")
    assert run_key(secret, "a") != run_key(secret, "b") != run_key(unsafe_secret(1), "b")
    assert secret.hex()[:16] not in secret_name(secret) and unsafe_secret(1) == unsafe_secret(1) != unsafe_secret(2)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
