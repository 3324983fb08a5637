"""What of the pipelines' side is pushed, each broken in every way of tests/hub/broken.py, and then whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from tests.hub.artefacts import images, new_npnet, new_step, same
from tests.hub.broken import break_pushes, contents


def nudge(*modules):
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.01)


def push():
    """Break the pushes of nets, guiders, pipelines, stock QuEST models and datasets; write down what is there last."""
    from datasets import Dataset
    from huggingface_hub import HfApi
    from transformers import AutoModelForCausalLM

    import hfnoise
    from hfnoise.preference import flip_labels
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    said, expected = {}, {}
    pipe = new_digits_pipeline(width=8)
    net, step = new_npnet(), new_step(pipe)
    for name, one in (("npnet", net), ("oms-module", step.module)):
        said[name] = break_pushes(f"tester/{name}", lambda one=one: nudge(one), lambda o=one, n=name: o.push_to_hub(n))
    guiders = iter([hfnoise.AdaptiveGuidance(threshold=0.9), hfnoise.AdaptiveGuidance(threshold=0.8)])
    held = [next(guiders)]
    said["guider"] = break_pushes(
        "tester/guider", lambda: held.append(next(guiders)), lambda: held[-1].push_to_hub("guider"), has_large=False
    )

    guided = hfnoise.GuidedStableDiffusionPipeline.from_pipe(pipe, guider=held[-1], initial_noise=[net, step])
    said["guided"] = break_pushes(
        "tester/guided", lambda: nudge(net, step.module, pipe.unet), lambda: guided.push_to_hub("tester/guided")
    )
    titles = HfApi().list_repo_files("tester/guided")
    assert {"guider/guider_config.json", "npnet/config.json", "oms_module/config.json"} <= set(titles)
    expected["guided"] = images(guided)

    def save():
        guided.save_pretrained("local", push_to_hub=True, repo_id="tester/saved")

    said["saved"] = break_pushes("tester/saved", lambda: nudge(net, pipe.unet), save)
    expected["saved"] = images(guided)
    expected["npnet"] = net.state_dict()

    # Stock code of transformers and datasets pushes these: its errors, our arithmetic.
    model = AutoModelForCausalLM.from_pretrained(os.environ["MODEL"])
    hfnoise.prepare_qat(model, hfnoise.QuestConfig(bits=1))
    packed = [hfnoise.export_packed(model)]

    def other():
        packed[0] = AutoModelForCausalLM.from_pretrained(os.environ["MODEL"])
        nudge(packed[0])
        torch.nn.init.normal_(packed[0].lm_head.weight)
        for name, module in packed[0].named_modules():
            if name.endswith("proj"):
                torch.nn.init.normal_(module.weight)
        packed[0] = hfnoise.export_packed(hfnoise.prepare_qat(packed[0], hfnoise.QuestConfig(bits=1)))

    break_pushes("tester/packed", other, lambda: packed[0].push_to_hub("packed"), ours=False)
    expected["packed"] = packed[0].state_dict()

    rows = [Dataset.from_dict({"prompt": ["p"] * n, "chosen": [f"c{i}" for i in range(n)], "rejected": ["r"] * n})
            for n in (20, 30)]  # fmt: skip
    noisy = [flip_labels(one, 0.3) for one in rows]
    break_pushes("tester/noisy", lambda: noisy.pop(0), lambda: noisy[0].push_to_hub("noisy"), ours=False,
                 repo_type="dataset")  # fmt: skip
    expected["noisy"] = noisy[0].to_list()

    folder = Path("pairs")
    shutil.copytree(Path(__file__).parents[2] / "model_cards" / "arithmetic-trace-pairs", folder)
    HfApi().create_repo("tester/pairs", repo_type="dataset")

    def grow():
        source = next((folder / "data").glob("train*"))
        Dataset.from_parquet(str(source)).select(range(5)).to_parquet(str(source))

    def upload():
        HfApi().upload_folder(repo_id="tester/pairs", folder_path=folder, repo_type="dataset")

    break_pushes("tester/pairs", grow, upload, ours=False, repo_type="dataset", skip=["the repository is refused"])
    assert contents("tester/pairs", "dataset").keys() >= {"README.md"}
    torch.save(expected, "expected.pt")
    print(json.dumps(said))


def pull():
    """Load in another process what the last push has left."""
    import datasets
    from transformers import AutoModelForCausalLM

    import hfnoise

    expected = torch.load("expected.pt")
    found = {"npnet": same(hfnoise.NPNet.from_pretrained("tester/saved"), expected["npnet"])}
    for name in ("guided", "saved"):
        pipe = hfnoise.AutoGuidedPipeline.from_pretrained(f"tester/{name}")
        found[name] = torch.equal(images(pipe), expected[name]) and pipe.guider.threshold == 0.8
    found["packed"] = same(AutoModelForCausalLM.from_pretrained("tester/packed"), expected["packed"])
    found["noisy"] = datasets.load_dataset("tester/noisy")["train"].to_list() == expected["noisy"]
    found["pairs"] = len(datasets.load_dataset("tester/pairs")["train"]) == 5
    print(json.dumps(found))
