"""A disk that is full while something is saved or pulled, in a process whose files may only grow so far.

A file that grows beyond the limit ends in the same OSError as one on a full disk, but for its number.
"""

from __future__ import annotations

import json
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.hub.artefacts import images, new_npnet, new_step, same
from tests.hub.broken import break_next, digest
from tests.hub.broken_pushes import nudge

# Configurations fit, weights do not.
ROOM = 4096


@contextmanager
def full_disk(room=ROOM):
    """Let no file grow beyond `room` bytes inside of the block."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def fails(function):
    """Return what the function says on a full disk."""
    try:
        with full_disk():
            function()
    except Exception as error:  # safetensors has an exception of its own
        return f"{type(error).__name__}: {error}"
    return None


def saves(folder, save, change):
    """Save, change, save on a full disk, save; return whether the folder was the old one and then the new one."""
    save()
    before = digest(folder)
    change()
    said = fails(save)
    after = digest(folder)
    save()
    return {"said": said, "intact": after == before, "new": digest(folder) != before}


def save():
    """Save over an earlier save on a full disk, by our code and by stock code."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    import hfnoise
    from hfnoise.__main__ import main
    from hfnoise.pipelines.noise_pairs import collect_noise_pairs
    from hfnoise.trainers.trace_pairs_saving import save_trace_pairs
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    pipe = new_digits_pipeline(width=8)
    net, step = new_npnet(), new_step(pipe)
    guided = hfnoise.GuidedStableDiffusionPipeline.from_pipe(
        pipe, guider=hfnoise.AdaptiveGuidance(), initial_noise=[net, step]
    )  # fmt: skip
    found = {"guided": saves("guided", lambda: guided.save_pretrained("guided"), lambda: nudge(net, pipe.unet))}
    assert torch.equal(images(hfnoise.AutoGuidedPipeline.from_pretrained("guided")), images(guided))
    found["oms"] = saves("oms", lambda: step.save_pretrained("oms"), lambda: nudge(step.module))

    pairs = Dataset.from_dict({"prompt": [f"{n} " * 400 for n in range(40)]})
    report = {"model": "m", "reward": "r", "prompts": 1, "pairs": 1, "samples": 2, "sampling": {}}
    counts = {"mean_reward": 0.5, "cut": 0, "completions": 1, "malformed": 0, "no_difference": 0}
    pairs.info.description = json.dumps(report | {"think": counts, "nothink": counts})
    held = [pairs]
    found["traces"] = saves(
        "traces", lambda: save_trace_pairs({"train": held[-1], "test": pairs}, "traces"),
        lambda: held.append(pairs.select(range(39))),
    )  # fmt: skip

    def collect():
        collect_noise_pairs(
            pipe, [f"the digit {n}" for n in range(8)], output_dir="npd", pairs_per_file=4, num_inference_steps=1,
            guidance_scale=1.0,
        )  # fmt: skip

    said = fails(collect)
    assert not list(Path("npd/data").glob("*.parquet")), "half a file of pairs"
    collect()
    found["npd"] = {"said": said, "intact": True, "new": len(list(Path("npd/data").glob("*.parquet"))) == 2}

    said = fails(lambda: main(["pack", os.environ["MODEL"], "packed", "--weight_bits", "2"]))
    left = Path("packed").exists()
    assert main(["pack", os.environ["MODEL"], "packed", "--weight_bits", "2"]) == 0
    hfnoise_model = AutoModelForCausalLM.from_pretrained("packed")
    found["packed"] = {"said": said, "intact": not left, "new": hfnoise_model is not None}

    # By stock code: diffusers and safetensors put the new file in the place of the earlier one when it is whole.
    found["npnet"] = saves("npnet", lambda: net.save_pretrained("npnet"), lambda: nudge(net))
    print(json.dumps(found))


def pull():
    """Pull on a full disk, then over a network that is cut, then well; half a file must not load in between."""
    import hfnoise
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    pipe = new_digits_pipeline(width=8)
    net = new_npnet()
    net.push_to_hub("npnet")
    guided = hfnoise.GuidedStableDiffusionPipeline.from_pipe(pipe, guider=hfnoise.AdaptiveGuidance())
    guided.initial_noise = [net, new_step(pipe)]
    guided.push_to_hub("guided")
    kinds = {
        "npnet": lambda: same(hfnoise.NPNet.from_pretrained("tester/npnet"), net.state_dict()),
        "guided": lambda: torch.equal(
            images(hfnoise.AutoGuidedPipeline.from_pretrained("tester/guided")), images(guided)
        ),
    }
    found = {}
    for name, load in kinds.items():
        said = [fails(load)]
        break_next({"pattern": f"GET /tester/{name}/resolve/.*safetensors", "cut_after": 1000})
        try:
            load()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        assert break_next(), "the download was never cut"
        found[name] = {"said": said, "whole": load()}
    print(json.dumps(found))
