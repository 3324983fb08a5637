"""Weights that run code, claim gigabytes or are somebody else's: refused, and nothing of them is executed."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, simulate_federation

REFUSED = (ValueError, OSError, RuntimeError)


class Bomb:
    """Leaves a trace where it is unpickled by a reader that executes what it reads."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def bomb(tmp_path):
    """Return a function that writes a pickle which runs code; at the end none may have run."""
    trace = tmp_path / "executed"

    def write(file, **beside):
        torch.save({**beside, "bomb": Bomb(trace)}, file)
        return file

    yield write
    assert not trace.exists()


def test_the_bomb_works(tmp_path):
    torch.save(Bomb(tmp_path / "trace"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "trace").exists()


def test_npnet_checkpoints(bomb, tmp_path):
    from hfnoise.latents.hf_npnet_checkpoints import convert_npnet_checkpoint

    with pytest.raises(ValueError, match="cannot be read as weights"):
        convert_npnet_checkpoint(bomb(tmp_path / "net.pth"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["NoisePromptNet", "OneMoreStep"])
def test_networks_of_pipelines(kind, bomb, tmp_path):
    import hfnoise
    from tests.trainers.noise_prompt_world import new_net
    from tests.trainers.one_more_step_world import new_module

    (new_net() if kind == "NoisePromptNet" else new_module()).save_pretrained(tmp_path / "net")
    (weights,) = (tmp_path / "net").glob("*.safetensors")
    weights.unlink()
    bomb(tmp_path / "net" / "diffusion_pytorch_model.bin")
    with pytest.raises(REFUSED):
        getattr(hfnoise, kind).from_pretrained(tmp_path / "net")


def test_packed_models(bomb, tmp_path, tiny_model_path):
    from transformers import AutoModelForCausalLM

    from hfnoise import QuestConfig, export_packed

    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, quantization_config=QuestConfig(bits=2))
    export_packed(model).save_pretrained(tmp_path / "packed")
    (tmp_path / "packed" / "model.safetensors").unlink()
    bomb(tmp_path / "packed" / "pytorch_model.bin")
    with pytest.raises((*REFUSED, Exception), match="(?i)weights|unsupported|load"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_checkpoints_of_trainers(name, bomb, make_preference_trainer):
    """What the stock Trainer reads on resume it reads with `weights_only`; `training_args.bin` it does not read."""
    trainer = make_preference_trainer()
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
    bomb(checkpoint / name)
    again = make_preference_trainer()
    if name == "training_args.bin":
        again.train(resume_from_checkpoint=str(checkpoint))
        assert again.state.global_step == 3
    else:
        with pytest.raises(Exception, match="(?i)weights.?only"):
            again.train(resume_from_checkpoint=str(checkpoint))


@pytest.fixture
def make_preference_trainer(tiny_model_path, tokenizer, cpu_arguments, make_pairs):
    """Return a function that builds a Trainer which saves after two of three steps."""

    def make():
        arguments = NoiseDPOConfig(**cpu_arguments | {"save_strategy": "steps", "save_steps": 2, "loss_type": "sym"})
        return NoiseDPOTrainer(
            tiny_model_path, args=arguments, train_dataset=make_pairs(16), processing_class=tokenizer
        )

    return make


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({trace!r}).mkdir(exist_ok=True)
class Own(LlamaForCausalLM): pass
class OwnConfig(LlamaConfig): model_type = "own"
"""


def test_models_with_code_of_their_own(tiny_model_path, tokenizer, make_pairs, cpu_arguments, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(tiny_model_path, folder)
    (folder / "own.py").write_text(CODE.format(trace=str(trace)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        NoiseDPOTrainer(
            str(folder), args=NoiseDPOConfig(**cpu_arguments, loss_type="sym"), train_dataset=make_pairs(8),
            processing_class=tokenizer,
        )  # fmt: skip
    assert not trace.exists()


def test_pipelines_with_code_of_their_own(tmp_path):
    from hfnoise import AutoGuidedPipeline
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    folder, trace = tmp_path / "pipeline", tmp_path / "executed"
    new_digits_pipeline(width=8).save_pretrained(folder)
    code = f"from pathlib import Path\nPath({str(trace)!r}).mkdir(exist_ok=True)\nclass Own: pass\n"
    (folder / "unet" / "own.py").write_text(code)
    (folder / "pipeline.py").write_text(code)
    stock = json.loads((folder / "model_index.json").read_text())
    for index in ({"_class_name": ["pipeline", "Own"]}, {"unet": ["own", "Own"]}, {"unet": ["../own", "Own"]}):
        (folder / "model_index.json").write_text(json.dumps(stock | index))
        # diffusers' own refusals; TypeError is of 0.42.0.
        with pytest.raises((ValueError, OSError, ImportError, AttributeError, TypeError)):
            AutoGuidedPipeline.from_pretrained(folder)
        assert not trace.exists()


# Safetensors that are broken. ---------------------------------------------------------------------------------------


def header(content):
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


def broken_files(good):
    """Yield contents of a file of weights that is none, by what is wrong with it."""
    yield "empty", b""
    yield "cut in the header", good[:20]
    yield "cut in the data", good[:-7]
    yield "header of exabytes", struct.pack("<Q", 2**60) + good[8:]
    yield "header of 99 MB", struct.pack("<Q", 99_000_000) + good[8:]
    yield "deep header", struct.pack("<Q", 20_000) + b"[" * 20_000
    huge = {"w": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 8]}}
    yield "shape of exabytes", header(huge) + b"\0" * 8
    outside = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**40]}}
    yield "data outside of the file", header(outside) + b"\0" * 8
    for at in (1, 9, 12, 30):
        yield f"bit {at}", good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :]


def other_weights(file):
    """Yield weights that are whole and not those that are expected."""
    tensors = load_file(file)
    first = sorted(tensors)[0]
    yield "one missing", {name: value for name, value in tensors.items() if name != first}
    yield "another shape", tensors | {first: torch.zeros(3, 5)}
    yield "none", {"other": torch.zeros(2)}


def npnet(folder):
    from hfnoise.latents.hf_npnet_checkpoints import load_npnet_checkpoint
    from tests.latents.npnet_states import own_state

    file = folder / "net.safetensors"
    save_file({name: value.contiguous() for name, value in own_state().items()}, file)
    return file, lambda: load_npnet_checkpoint(file, num_tokens=5)


def average(folder):
    from hfnoise.trainers.diffusion_average import AVERAGE_FILE, WeightAverage
    from tests.trainers.diffusion_world import new_unet

    model = new_unet()
    kept = WeightAverage(0.9)
    kept.start(model)
    kept.save(folder, model)
    return folder / AVERAGE_FILE, lambda: kept.load(folder, model)


def denoiser(folder):
    from hfnoise.trainers.diffusion_saving import load_weights
    from tests.trainers.diffusion_world import new_unet

    model = new_unet()
    model.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    return file, lambda: load_weights(model, folder)


READERS = {"npnet": npnet, "average": average, "denoiser": denoiser}


@pytest.mark.parametrize("kind", READERS)
def test_broken_weights(kind, tmp_path):
    file, read = READERS[kind](tmp_path)
    good = file.read_bytes()
    for what, content in broken_files(good):
        file.write_bytes(content)
        try:
            read()
        except REFUSED as error:
            assert str(error), what
        assert file.read_bytes() == content
    file.write_bytes(good)


@pytest.mark.parametrize("kind", READERS)
def test_weights_of_something_else(kind, tmp_path):
    file, read = READERS[kind](tmp_path)
    read()
    others = list(other_weights(file))
    for what, tensors in others:
        save_file(tensors, file, metadata={"format": "pt", "optimization_step": "3"})
        with pytest.raises(ValueError) as caught:
            read()
        assert str(tmp_path) in str(caught.value), what


@pytest.mark.slow
def test_the_state_of_a_federation(make_federation, tmp_path):
    """A server that cannot read all of a state takes nothing of it."""
    from hfnoise.trainers.federated_saving import STATE_FILE

    server, clients, _ = make_federation(folder=False)
    simulate_federation(server, clients, output_dir=tmp_path, progress=False)
    file = tmp_path / STATE_FILE
    good = file.read_bytes()
    contents = [content for _, content in broken_files(good)]
    with safe_open(file, framework="pt") as archive:
        metadata = archive.metadata()
    tensors, state = load_file(file), json.loads(metadata["state"])
    for name in tensors:
        save_file({key: value for key, value in tensors.items() if key != name}, file, metadata=metadata)
        contents.append(file.read_bytes())
    for name in state:
        for value in (None, "x", [], {}):
            save_file(tensors, file, metadata=metadata | {"state": json.dumps(state | {name: value})})
            contents.append(file.read_bytes())
    fresh, *_ = make_federation(folder=False)
    refused = 0
    for content in contents:
        file.write_bytes(content)
        try:
            fresh.load(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error)
            refused += 1
            assert fresh.round == 0 and not fresh.participants
        else:
            fresh, *_ = make_federation(folder=False)
    assert refused > len(contents) / 2
    file.write_bytes(good)
    fresh.load(tmp_path)
    assert fresh.round == state["round"] > 0
