"""NPNet against what the official network computes, and what ours adds: determinism, sizes, tokens, signs."""

import numpy
import pytest
import torch

from hfnoise.latents import hf_npnet
from hfnoise.latents.hf_npnet import NPNetModel
from hfnoise.latents.resizing import resized_delta, resized_noise
from hfnoise.latents.singular_values import FactorCache, NoiseFactors, noise_factors, tile_shape, tiled, untiled
from tests.latents.npnet_states import SIZES, TINY, count, official_shapes, own_state, perturbed, vectors


@pytest.fixture(scope="module")
def golden():
    net = NPNetModel(**SIZES, svd_sign="lapack").eval()
    net.load_state_dict(own_state())
    return net


def new_net(**options):
    torch.manual_seed(0)
    return perturbed(NPNetModel(**{**TINY, "encoder_hid_dim": 6, **options}))


def inputs(count=2, channels=4, height=8, width=8, tokens=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, height, width, generator=generator)
    return noise, torch.randn(count, tokens, 6, generator=generator)


def test_equals_the_official_network(golden, monkeypatch):
    truth = vectors()
    noise, states = truth["initial_noise"], truth["prompt_embeds"]
    assert torch.equal(tiled(noise, 2), truth["matrix"])
    # The recorded factors: another LAPACK may give other signs.
    factors = NoiseFactors(*(truth[name] for name in ("U", "S", "Vh")))
    monkeypatch.setattr(hf_npnet, "noise_factors", lambda matrix, sign: factors)
    with torch.no_grad():
        text = golden.text_embedding(noise, states.flatten(1))
        images = golden.unet_embedding.downconv(torch.nn.functional.interpolate(noise + text, 224))
        parts = {
            "text_emb": text,
            "swin_features": golden.unet_embedding.swin(images),
            "transformer_out": golden.unet_embedding(noise + text),
            "svd_out": noise + untiled(golden.unet_svd(factors), 2, 2),
        }
        for name, part in parts.items():
            torch.testing.assert_close(part, truth[name], rtol=0, atol=1e-5)
        refined = golden(noise, states)
    torch.testing.assert_close(refined.noise, truth["golden_noise"], rtol=0, atol=2e-5)
    torch.testing.assert_close(refined.delta, truth["golden_noise"] - noise, rtol=0, atol=2e-5)


def test_factors():
    matrix = tiled(inputs()[0], 2)
    u, s, vh = noise_factors(matrix, "canonical")
    torch.testing.assert_close((u * s[:, None]) @ vh, matrix, rtol=0, atol=1e-5)
    assert bool((u.gather(1, u.abs().argmax(1, keepdim=True)) > 0).all())
    # Whatever signs a library gives.
    flipped = noise_factors(-matrix, "canonical")
    torch.testing.assert_close(flipped.u, u, rtol=0, atol=1e-4)
    torch.testing.assert_close(flipped.vh, -vh, rtol=0, atol=1e-4)
    assert torch.equal(noise_factors(matrix, "lapack").s, s)
    with pytest.raises(ValueError, match="sign must be one of"):
        noise_factors(matrix, "other")
    with pytest.raises(ValueError, match="noise holds NaN or infinity"):
        noise_factors(torch.full((1, 2, 2), torch.nan))


def test_signs_matter():
    """Released nets read the signs as LAPACK gives them, new ones their own: the same weights, another result."""
    noise, states = inputs()
    with torch.no_grad():
        released, new = (new_net(svd_sign=sign)(noise, states).delta for sign in ("lapack", "canonical"))
        assert not torch.allclose(released, new, atol=1e-4)


def test_same_in_training_where_factors_are_remembered():
    net, (noise, states) = new_net(), inputs()
    with torch.no_grad():
        first = net(noise, states).noise
        assert torch.equal(net(noise, states).noise, first) and net.factor_cache.computed == 0
        net.train()
        again = [net(noise, states).noise for _ in range(2)]
        assert torch.equal(again[0], first) and torch.equal(again[1], first) and net.factor_cache.computed == 2
        torch.testing.assert_close(net(noise.flip(0), states.flip(0)).noise, first.flip(0))
        assert net.factor_cache.computed == 2


def test_cache_forgets():
    matrix = torch.randn(3, 4, 4)
    size = 4 * (16 + 4 + 16)
    cache = FactorCache(max_bytes=2 * size)
    for row in (0, 1, 0, 2, 0, 1):  # 1 was not asked for longest when 2 came
        cache(matrix[row : row + 1], noise_factors)
    assert cache.computed == 4
    assert torch.equal(FactorCache(0)(matrix, noise_factors).u, noise_factors(matrix).u)
    with pytest.raises(ValueError, match="max_bytes must be at least 0"):
        FactorCache(-1)


def test_a_sample_does_not_depend_on_its_batch():
    net, (noise, states) = new_net(), inputs(3)
    with torch.no_grad():
        together = net(noise, states).noise
        alone = torch.cat([net(noise[i : i + 1], states[i : i + 1]).noise for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_half_precision(dtype):
    """Whatever is half, the arithmetic is not: the error is that of rounding the weights and the noise once."""
    net, (noise, states) = new_net(), inputs()
    with torch.no_grad():
        whole = net(noise.to(dtype), states.to(dtype))
        assert whole.noise.dtype == torch.float32
        assert torch.equal(net(noise.to(dtype).float(), states.to(dtype).float()).noise, whole.noise)
        with torch.autocast("cpu", dtype):
            assert torch.equal(net(noise.to(dtype), states.to(dtype)).noise, whole.noise)
        rounded = new_net().to(dtype)
        again = new_net()
        again.load_state_dict(rounded.state_dict())
        assert torch.equal(rounded(noise, states).noise, again(noise, states).noise)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (4, 8), (12, 20)])
def test_other_sizes_change_the_delta_only(height, width):
    net, (noise, states) = new_net(), inputs(height=height, width=width)
    with torch.no_grad():
        refined = net(noise, states)
        own = net(resized_noise(noise, 8, 8), states).delta
    assert torch.equal(refined.noise, noise + refined.delta)
    torch.testing.assert_close(refined.delta, resized_delta(own, height, width))


@pytest.mark.parametrize("size", [(8, 8), (4, 16), (24, 40), (5, 7)])
def test_resized_noise_has_unit_variance(size):
    noise = torch.randn(4000, 1, 12, 16, generator=torch.Generator().manual_seed(0))
    spread = resized_noise(noise, *size).std(dim=(0, 1))
    assert float((spread - 1).abs().max()) < 0.07  # 6 standard errors, 1 / sqrt(2 * 4000)
    assert torch.equal(resized_noise(noise, 12, 16), noise)


def test_tokens():
    noise, states = inputs(tokens=16)
    net, mean = new_net(), new_net(long_prompts="mean")
    with torch.no_grad():
        chunks = [net(noise, chunk).delta for chunk in states.split(8, 1)]
        assert torch.equal(net(noise, states).delta, chunks[0])
        torch.testing.assert_close(mean(noise, states).delta, sum(chunks) / 2)
        for one, number, wanted in ((net, 7, "at least 8"), (mean, 12, "a multiple of 8")):
            with pytest.raises(ValueError, match=f"takes {wanted} tokens, got {number}: .* NoisePromptNet"):
                one(noise, states[:, :number])


@pytest.mark.parametrize(("channels", "rows", "shape"), [(16, None, (4, 4)), (8, None, (2, 4)), (8, 1, (1, 8))])
def test_channels(channels, rows, shape):
    assert tile_shape(channels, rows) == shape
    net = new_net(in_channels=channels, tile_rows=rows)
    with torch.no_grad():
        assert net(*inputs(channels=channels)).delta.shape == (2, channels, 8, 8)


@pytest.mark.parametrize("attention", [True, False])
def test_all_parameters_are_trained(attention):
    """DistributedDataParallel needs a gradient of each; none is left over of what the official network never uses."""
    net, (noise, states) = new_net(svd_attention=attention).train(), inputs()
    net(noise, states).noise.square().mean().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
    assert any("attention" in name for name in net.state_dict()) is attention


def test_scale_and_norm():
    net, (noise, states) = new_net(), inputs()
    with torch.no_grad():
        full = net(noise, states)
        net.scale = 0.5
        half = net(noise, states)
        torch.testing.assert_close(half.noise, noise + 0.5 * full.delta)
        assert torch.equal(half.delta, full.delta) and net.config.scale == 0.5
        kept = new_net(renormalize=True)(noise, states)
    torch.testing.assert_close(kept.noise.flatten(1).norm(dim=1), noise.flatten(1).norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(kept.noise.flatten(1), full.noise.flatten(1)), torch.ones(2))


def test_size_of_the_official_network():
    """The published 30.5 million, less the classifier and the batch norm that have no part."""
    with torch.device("meta"):
        net = NPNetModel()
    shapes = {f"{part}.{name}": shape for part, names in official_shapes().items() if isinstance(names, dict)
              for name, shape in names.items()}  # fmt: skip
    unused = sum(numpy.prod(shape) for name, shape in shapes.items() if ".head." in name or name.endswith("bn.weight"))
    unused += 256  # the bias of the batch norm; its statistics are no parameters
    assert count(net) + unused == 30_470_427  # with alpha and beta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"svd_sign": "other"}, "svd_sign must be one of"),
        ({"long_prompts": "other"}, "long_prompts must be one of"),
        ({"tile_rows": 3}, "tile_rows must divide the 4 channels, got 3"),
        ({"in_channels": 0}, "latents need a channel"),
        ({"svd_num_heads": 7}, "svd_num_heads must divide the 16 singular values"),
        ({"swin_image_size": 20}, "image_size must be a multiple of 8"),
        ({"swin_num_heads": [1]}, "an entry for each stage"),
        ({"swin_num_heads": [3, 2]}, "stage 0 has 8 channels, which 3 heads cannot share"),
        ({"scale": -1.0}, "scale must be at least 0"),
        ({"sample_size": 0}, "sample_size must be at least 1"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        new_net(**options)


def test_refused_inputs():
    net, (noise, states) = new_net(), inputs()
    with pytest.raises(
        ValueError, match=r"NPNet takes noise of shape \(batch, 4, height, width\), got \(2, 3, 8, 8\)"
    ):
        net(noise[:, :3], states)
    with pytest.raises(ValueError, match=r"text states of shape \(2, tokens, 6\), got \(2, 8, 5\)"):
        net(noise, states[..., :5])
    with pytest.raises(ValueError, match="attention_mask must have a number a text state"):
        net(noise, states, torch.ones(2, 7))
    with pytest.raises(ValueError, match="scale must be at least 0"):
        net.scale = float("nan")
    with pytest.raises(ValueError, match="noise holds NaN"):
        net(noise * torch.nan, states)
