"""Official checkpoints of NPNet: both layouts, names of old and new timm, sizes from the weights, refusals."""

import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hfnoise.latents.hf_npnet import NPNetModel
from hfnoise.latents.hf_npnet_checkpoints import convert_npnet_checkpoint, load_npnet_checkpoint, npnet_config
from tests.latents.npnet_states import SIZES, official_shapes, official_state, own_state

PARTS = {"unet_svd": "unet_svd", "unet_embedding": "unet_embedding", "text_embedding": "embeeding"}
SWIN = "unet_embedding.swin."
# What is in official files and has no part in the result.
EXTRA = {
    f"{SWIN}head.fc.weight": torch.zeros(1000, 64),
    f"{SWIN}layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
    f"{SWIN}layers.0.blocks.1.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long),
}


def old_names(state):
    """Return the names of timm below 0.9, where the merging of patches ends a stage."""

    def old(name):
        match = re.fullmatch(r"(.*layers\.)(\d)(\.downsample.*)", name)
        return name if match is None else f"{match[1]}{int(match[2]) - 1}{match[3]}"

    return {old(name): value for name, value in state.items()}


def pickled(state):
    """Return the official dictionary of dictionaries, with parameters where it has them."""
    parts = {theirs: {} for theirs in PARTS.values()}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        if rest:
            parts[PARTS[first]][rest] = value
        else:
            parts[name] = torch.nn.Parameter(value.clone())
    return parts


def write(path, state):
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(pickled(state), path)
    return path


@pytest.mark.parametrize(
    ("ending", "names"),
    [
        ("pth", old_names),
        ("safetensors", dict),
        pytest.param("pth", dict, marks=pytest.mark.slow),
        pytest.param("safetensors", old_names, marks=pytest.mark.slow),
    ],
)
def test_official_checkpoint(tmp_path, ending, names):
    path = write(tmp_path / f"npnet.{ending}", names({**official_state(), **EXTRA}))
    net = NPNetModel.from_single_file(path, num_tokens=5, scale=0.5)
    expected = {**SIZES, "svd_sign": "lapack", "scale": 0.5, "in_channels": 4, "svd_attention": True}
    assert {name: net.config[name] for name in expected} == expected and not net.training
    assert net.state_dict().keys() == own_state().keys()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in own_state().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_conversion(tmp_path):
    (tmp_path / "there").mkdir()
    numbers = {name: value.reshape(()) if name in ("alpha", "beta") else value for name, value in own_state().items()}
    path = write(tmp_path / "there" / "npnet.pth", numbers)
    noise, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    for src in (path, path.parent):  # the file, or the folder with that one file
        net = convert_npnet_checkpoint(src, tmp_path / "here", num_tokens=5, torch_dtype=torch.bfloat16)
        again = NPNetModel.from_pretrained(tmp_path / "here", dtype=torch.bfloat16)
        assert again.dtype == torch.bfloat16 and again.config.svd_sign == "lapack"
        with torch.no_grad():
            assert torch.equal(again(noise, states).noise, net(noise, states).noise)
    with pytest.raises(ValueError, match="dst must be a folder"):
        convert_npnet_checkpoint(path, path)


@pytest.mark.slow
def test_attention_can_be_left_out(tmp_path):
    without = {name: value for name, value in official_state().items() if ".attention." not in name}
    given = load_npnet_checkpoint(write(tmp_path / "a.pth", official_state()), num_tokens=5, svd_attention=False)
    assert (
        given.state_dict().keys()
        == load_npnet_checkpoint(write(tmp_path / "b.pth", without), num_tokens=5).state_dict().keys()
    )
    with pytest.raises(ValueError, match="has no attention over singular vectors: leave svd_attention away"):
        load_npnet_checkpoint(tmp_path / "b.pth", num_tokens=5, svd_attention=True)


@pytest.mark.parametrize(("model", "numbers", "width"), [("sdxl", 157696, 2048), ("hunyuan-dit", 78848, 1024)])
def test_sizes_of_the_released_checkpoints(model, numbers, width):
    shapes = {
        f"{ours}.{name}": torch.Size(shape)
        for ours, theirs in PARTS.items()
        for name, shape in official_shapes()[theirs].items()
        if ".head." not in name and not name.startswith("bn.")
    }
    shapes |= {name: torch.Size(official_shapes()[name]) for name in ("alpha", "beta")}
    shapes["text_embedding.linear.weight"] = torch.Size((8, numbers))
    config = npnet_config({name: SimpleNamespace(shape=shape) for name, shape in shapes.items()})
    with torch.device("meta"):
        net = NPNetModel(**config)
        default = NPNetModel(encoder_hid_dim=width, svd_sign="lapack")
    assert {name: value.shape for name, value in net.state_dict().items()} == shapes
    as_lists = {name: list(value) if isinstance(value, tuple) else value for name, value in default.config.items()}
    assert {name: as_lists[name] for name in config} == config


class Code:
    """Would run something when it is unpickled."""

    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"unet_svd": Code()}, protocol=2))
    (tmp_path / "page.pth").write_text("<html>quota exceeded</html>")
    (tmp_path / "page.safetensors").write_text("<html>quota exceeded</html>")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"unet": {}}, tmp_path / "part.pth")
    torch.save({**pickled(official_state()), "epoch": 3}, tmp_path / "number.pth")
    for name, message in {
        "code.pth": "cannot be read as weights", "page.pth": "cannot be read as weights",
        "page.safetensors": "cannot be read as weights", "list.pth": "it holds a list", "part.pth": "a part 'unet'",
        "number.pth": "epoch is no tensor",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_npnet_checkpoint(tmp_path / name)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="must hold one checkpoint .* and has code.pth, list.pth.* Give filename="):
        load_npnet_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no file other.pth"):
        load_npnet_checkpoint(tmp_path, filename="other.pth")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_npnet_checkpoint(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no file, no folder and no name of a repository"):
        load_npnet_checkpoint("a/b/c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet_svd.mlp1.0.weight": None}, "it has no unet_svd.mlp1.0.weight"),
        ({"unet_svd.mlp2.0.bias": None}, "it lacks unet_svd.mlp2.0.bias"),
        ({"unet_svd.mlp5.0.bias": torch.zeros(1)}, "it has, and NPNet has not, unet_svd.mlp5.0.bias"),
        ({"alpha": torch.zeros(2)}, r"it has in another shape alpha \(2,\) instead of \(1,\)"),
        ({"text_embedding.linear.weight": torch.zeros(8, 81)}, "reads 81 numbers, which 5 tokens cannot share"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    state = {**official_state(), **change}
    path = write(tmp_path / "npnet.safetensors", {name: value for name, value in state.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        load_npnet_checkpoint(path, num_tokens=5)
