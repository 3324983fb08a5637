"""NoisePromptModel: the identity at first, any size, masks, its number of parameters; saving of both networks."""

import pytest
import torch

from hfnoise.latents.hf_npnet import NPNetModel
from hfnoise.latents.hf_prompt_net import NoisePromptModel
from tests.latents.npnet_states import TINY, count, perturbed

# For the digits: latents of 4 x 8 x 8, text states 64 wide.
DIGITS = {"encoder_hid_dim": 64, "pooled_dim": 64, "map_size": 8, "hidden_channels": 32}
SMALL = {"encoder_hid_dim": 6, "pooled_dim": 8, "map_size": 4, "hidden_channels": 8}


def new_net(**options):
    torch.manual_seed(0)
    return perturbed(NoisePromptModel(**{**SMALL, **options}))


def inputs(count=2, channels=4, height=8, width=8, tokens=5):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, channels, height, width, generator=generator)
    return noise, torch.randn(count, tokens, 6, generator=generator)


@pytest.mark.parametrize("renormalize", [False, True])
def test_identity_before_training(renormalize):
    noise, states = inputs()
    refined = NoisePromptModel(**SMALL, renormalize=renormalize)(noise, states)
    assert torch.equal(refined.noise, noise) and not refined.delta.any()


@pytest.mark.parametrize(("channels", "height", "width", "tokens"), [(4, 8, 8, 5), (16, 12, 7, 1), (1, 3, 20, 300)])
def test_any_size(channels, height, width, tokens):
    noise, states = inputs(2, channels, height, width, tokens)
    with torch.no_grad():
        refined = new_net(in_channels=channels)(noise, states)
    assert refined.delta.shape == noise.shape and bool((refined.delta != 0).all())
    assert torch.equal(refined.noise, noise + refined.delta)


def test_padding_has_no_part():
    net, (noise, states) = new_net(), inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        masked = net(noise, states, mask).delta
        torch.testing.assert_close(masked[:1], net(noise[:1], states[:1, :3]).delta)
        torch.testing.assert_close(masked[1:], net(noise[1:], states[1:]).delta)
        assert not torch.allclose(masked[:1], net(noise[:1], states[:1]).delta)
        assert bool(torch.isfinite(net(noise, states, 0 * mask).delta).all())


def test_a_sample_does_not_depend_on_its_batch():
    net, (noise, states) = new_net(), inputs(3)
    with torch.no_grad():
        together = net(noise, states).noise
        alone = torch.cat([net(noise[i : i + 1], states[i : i + 1]).noise for i in range(3)])
        assert torch.equal(net.train()(noise, states).noise, together)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("layers", [0, 3])
def test_all_parameters_are_trained(layers):
    """Also at the very first step, where the last layers are zero."""
    net, (noise, states) = NoisePromptModel(**SMALL, num_layers=layers), inputs()
    net(noise, states, torch.ones(2, 5)).delta.sub(1).square().mean().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
    assert (net.residual is not None) is bool(layers)


def test_number_of_parameters():
    """At most 3 times the official shape in miniature on digits, 29.8 thousand, and a tenth of its 30.5 million."""
    digits = NoisePromptModel(**DIGITS)
    # The miniature: 256 hidden numbers before the singular values, a Swin of one block of 24 channels.
    miniature = NPNetModel(
        sample_size=8, num_tokens=8, encoder_hid_dim=64, svd_value_dim=256, swin_image_size=16, swin_patch_size=2,
        swin_window_size=8, swin_embed_dim=24, swin_depths=[1], swin_num_heads=[3],
    )  # fmt: skip
    assert count(miniature) < 29_800 and count(digits) <= 3 * count(miniature)
    with torch.device("meta"):
        assert count(NoisePromptModel()) <= 30_470_425 / 10


@pytest.mark.parametrize(("new", "options"), [(NPNetModel, TINY), (NoisePromptModel, SMALL)])
def test_save_and_load(tmp_path, new, options):
    torch.manual_seed(0)
    net = perturbed(new(**{**options, "encoder_hid_dim": 6, "scale": 0.5}))
    noise, states = inputs(tokens=8)
    net.save_pretrained(tmp_path / "net")
    net.save_pretrained(tmp_path / "pipeline" / "npnet")
    with torch.no_grad():
        before = net(noise, states).noise
        for path, where in (("net", None), ("pipeline", None), ("pipeline", "npnet")):
            again = new.from_pretrained(tmp_path / path, subfolder=where)
            assert torch.equal(again(noise, states).noise, before) and not again.training
    assert new.from_pretrained(tmp_path / "net", scale=0.25).scale == 0.25
    assert new.from_pretrained(tmp_path / "net", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert new.from_config(net.config).config.encoder_hid_dim == 6
    other = NPNetModel if new is NoisePromptModel else NoisePromptModel
    with pytest.raises(ValueError, match=f"holds a {new.saved_class}, and no {other.saved_class}"):
        other.from_pretrained(tmp_path / "net")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"holds no {new.saved_class}: there is no npnet/config.json"):
        new.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"is a file. An official checkpoint of NPNet is read by NPNet\.from_single"):
        new.from_pretrained(tmp_path / "net" / "config.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"map_size": 0}, "map_size must be at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must be at least 0, where 0 leaves the convolutions out; got -1"),
        ({"pooling_heads": 3}, r"pooling_heads \(3\) must divide pooled_dim \(8\)"),
        ({"norm_num_groups": 5}, r"norm_num_groups \(5\) hidden_channels \(8\)"),
        ({"scale": float("inf")}, "scale must be at least 0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        new_net(**options)
