"""`hfnoise golden-noise`: from prompts to a network that `hfnoise generate` uses."""

import json

import pytest

import hfnoise
from hfnoise.__main__ import main
from hfnoise.golden_noise_options import GOLDEN_NOISE_OPTIONS, NOISE_NET_OPTIONS, NOISE_PAIR_OPTIONS
from hfnoise.trainers.golden_noise_arguments import GoldenNoiseScriptArguments
from hfnoise.trainers.launch_golden_noise import new_net
from hfnoise.trainers.prompt_lists import load_prompts


@pytest.fixture
def arguments(tmp_path):
    """Return a function that gives the command line of a tiny run with some options changed."""

    def make(**changes):
        settings = {
            "model_name_or_path": "digits-weak", "dataset_name": "hfnoise:digits", "max_prompts": 4,
            "noises_per_prompt": 4, "output_dir": str(tmp_path / "net"), "pair_batch_size": 8,
            "num_inference_steps": 2, "guidance_scale": 1.0, "max_steps": 2, "per_device_train_batch_size": 4,
            "validation_size": 0.25, "net_options": '{"hidden_channels": 8, "num_layers": 1, "map_size": 4}',
            "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        }  # fmt: skip
        given = {name: value for name, value in (settings | changes).items() if value is not None}
        return ["golden-noise", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]

    return make


def usage_error(capsys, arguments):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_help(capsys):
    assert main(["golden-noise", "--help"]) == 0
    text = capsys.readouterr().out
    for option in (*GOLDEN_NOISE_OPTIONS, *NOISE_PAIR_OPTIONS, *NOISE_NET_OPTIONS):
        assert f"--{option.name} (" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "give --model_name_or_path (a Hub id, a folder, or digits)"),
        ({"dataset_name": None}, "give either prompts_file"),
        ({"prompts_file": "there.txt"}, "give either prompts_file"),
        ({"dataset_name": "hfnoise:letters"}, "no prompts named 'hfnoise:letters'; there are hfnoise:digits"),
        ({"model_name_or_path": "./nowhere"}, "no such folder"),
        ({"loss": "reward"}, "give --verifier"),
        (
            {"loss": "reward", "verifier": "digits", "redenoise_strength": 2.0},
            "redenoise_strength, validation_size: of pairs, and loss='reward' collects none",
        ),
        ({"min_margin": 0.0}, "give --verifier"),
        ({"verifier_processor": "x"}, "verifier_processor is of --verifier"),
        ({"architecture": "unet"}, "architecture is 'unet'; choose noise-prompt-net or npnet"),
        ({"net_options": "{map"}, "is no JSON"),
        ({"npnet": "net"}, "leave --net_options out"),
        ({"npnet": "net", "net_options": None, "architecture": "npnet"}, "leave --architecture out"),
        ({"loss": "reward", "verifier": "digits"}, "noises_per_prompt, validation_size: of pairs"),
        ({"eval_images": 4}, "judged by --verifier, which is not given"),
        ({"redenoise_steps": 1}, "redenoise_steps must be at least 2, got 1"),
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0, got -1.0"),
        ({"redenoise_steps": 9, "redenoise_strength": 1.0}, "give one"),
        ({"validation_size": 1.0}, "give a share in [0, 1)"),
        ({"verifier": "digits", "eval_images": 0}, "eval_images must be at least 1, got 0"),
    ],
)
def test_bad_input_ends_before_anything_is_collected(capsys, arguments, tmp_path, changes, message):
    assert message in usage_error(capsys, arguments(**changes))
    assert not (tmp_path / "net").exists() and not (tmp_path / "net-pairs").exists()


def test_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\none\nthree\n")
    script = GoldenNoiseScriptArguments("digits", prompts_file=str(tmp_path / "prompts.txt"), max_prompts=2)
    assert load_prompts(script) == ["one", "two"]
    (tmp_path / "rows.jsonl").write_text('{"words": "a cat"}\n')
    rows = str(tmp_path / "rows.jsonl")
    assert load_prompts(GoldenNoiseScriptArguments("x", dataset_name=rows, caption_column="words")) == ["a cat"]
    with pytest.raises(ValueError, match="has no column 'text'"):
        load_prompts(GoldenNoiseScriptArguments("x", dataset_name=rows))


def test_new_networks_fit_the_pipeline():
    script = GoldenNoiseScriptArguments("x", dataset_name="hfnoise:digits")
    sdxl = new_net(script, (4, 128, 128), (77, 2048)).config
    assert (sdxl.map_size, sdxl.pooled_dim, sdxl.in_channels, sdxl.encoder_hid_dim) == (32, 256, 4, 2048)
    small = {
        "swin_image_size": 32,
        "swin_window_size": 4,
        "swin_embed_dim": 8,
        "swin_depths": [1],
        "swin_num_heads": [1],
    }
    script = GoldenNoiseScriptArguments("x", dataset_name="a", architecture="npnet", net_options=small)
    official = new_net(script, (4, 8, 8), (8, 64))
    assert type(official) is hfnoise.NPNet and official.config.num_tokens == 8 and official.config.sample_size == 8


@pytest.mark.slow
def test_from_prompts_to_a_network(arguments, tmp_path, capsys):
    judged = {"verifier": "digits", "eval_images": 4}
    assert main(arguments(**judged, margin_temperature=1.0, eval_strategy="epoch")) == 0
    shown = capsys.readouterr().out
    for text in ("16 pairs of 4 prompts", "R2 of the change: ", "pairs of images (95 %", "judge_accuracy: "):
        assert text in shown
    card = (tmp_path / "net" / "README.md").read_text()
    assert "| pipeline | `hfnoise:digits-weak` (0.68 M" in card and "huggingface.co/digits" not in card
    assert "images preferred over those of plain noise" in card and "frechet distance, refined" in card
    # Of one image a digit there is no diversity: said, not "nan".
    assert "| diversity, plain | not a number |" in card
    net = hfnoise.load_noise_net(tmp_path / "net")
    assert type(net) is hfnoise.NoisePromptNet and net.map.weight.abs().max() > 0
    # Again, from that network: the pairs are there, and nothing is collected twice.
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "net-pairs" / "data").iterdir()}
    more = {"npnet": str(tmp_path / "net"), "net_options": None, "output_dir": str(tmp_path / "more")}
    assert main(arguments(**judged, pairs_dir=str(tmp_path / "net-pairs"), **more)) == 0
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "net-pairs" / "data").iterdir()}
    assert json.loads((tmp_path / "more" / "config.json").read_text())["map_size"] == 4


@pytest.mark.slow
def test_by_reward(arguments, tmp_path, capsys):
    of_pairs = {"noises_per_prompt": None, "validation_size": None}
    given = arguments(loss="reward", verifier="digits", eval_images=4, num_inference_steps=1, **of_pairs)
    assert main(given) == 0
    assert "pairs of images" in capsys.readouterr().out and not (tmp_path / "net-pairs").exists()
    assert hfnoise.load_noise_net(tmp_path / "net").map.weight.abs().max() > 0


@pytest.mark.slow
def test_a_wrong_checkpoint_is_one_line(capsys, arguments, tmp_path):
    wrong = arguments(resume_from_checkpoint=str(tmp_path / "nowhere"))
    assert "is not a folder" in usage_error(capsys, wrong)
