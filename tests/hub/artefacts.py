"""Artefacts of every kind, as two fresh processes push and pull them: what comes back is what was there, to the bit.

`push()` and `pull()` run with the loopback Hub, one after the other, in the same folder; what was pushed is written
down in `expected.pt`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CUSTOM = ("adaptive-guidance", "golden-noise", "one-more-step", "projected-guidance")
PROMPT = "the digit seven"
IDS = torch.tensor([[5, 6, 7]])
BLOCK = """
from diffusers.modular_pipelines.wan.before_denoise import WanPrepareLatentsStep
from hfnoise.pipelines import InitialNoiseBlock


class RefinedLatents(InitialNoiseBlock):
    def __init__(self):
        super().__init__(WanPrepareLatentsStep())
"""


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=2, output_type="latent", generator=generator).images


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def predicted(unet):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return unet(
            torch.randn(1, 4, 8, 8, generator=generator), 1, torch.randn(1, 8, 64, generator=generator)
        ).sample  # fmt: skip


def upload(name, folder, repo_type="model"):
    from huggingface_hub import HfApi

    HfApi().create_repo(f"tester/{name}", repo_type=repo_type)
    HfApi().upload_folder(repo_id=f"tester/{name}", folder_path=folder, repo_type=repo_type)


def new_npnet():
    import hfnoise

    torch.manual_seed(0)
    return hfnoise.NPNet(
        sample_size=8, num_tokens=8, encoder_hid_dim=64, swin_image_size=16, swin_patch_size=2, swin_window_size=2,
        swin_embed_dim=8, swin_depths=[1, 1], swin_num_heads=[1, 2],
    )  # fmt: skip


def new_step(pipe):
    import hfnoise

    module = hfnoise.TimeFreeUNet2DConditionModel.from_config(pipe.unet.config)
    return hfnoise.OneMoreStep(module.eval(), eta=0.25)


def push():
    """Push one of each kind."""
    from datasets import Dataset
    from huggingface_hub import metadata_update
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    import hfnoise
    from hfnoise.pipelines.noise_pairs import collect_noise_pairs
    from hfnoise.preference import flip_labels
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    expected = {}
    model = AutoModelForCausalLM.from_pretrained(os.environ["MODEL"])
    hfnoise.dequantize(hfnoise.prepare_qat(model, hfnoise.QuestConfig(weight_bits=2)))
    expected["quest-dense"] = logits(model)
    model.push_to_hub("quest-dense")
    PreTrainedTokenizerFast.from_pretrained(os.environ["MODEL"]).push_to_hub("quest-dense")

    pipe = new_digits_pipeline(width=8)
    pipe.push_to_hub("digits")
    unet = hfnoise.export_packed(
        hfnoise.prepare_qat(new_digits_pipeline(width=8).unet, hfnoise.QuestConfig(bits=4))
    )  # fmt: skip
    expected["quest-unet"] = predicted(unet)
    unet.push_to_hub("quest-unet")

    hfnoise.AdaptiveGuidance(threshold=0.97, inner=hfnoise.ProjectedGuidance()).push_to_hub("guider")
    net, step = new_npnet(), new_step(pipe)
    expected["npnet"] = {name: value.clone() for name, value in net.state_dict().items()}
    net.push_to_hub("npnet")
    step.save_pretrained("oms")
    upload("oms", "oms")
    step.module.push_to_hub("oms-module")
    expected["oms"] = {name: value.clone() for name, value in step.module.state_dict().items()}
    slots = {
        "adaptive-guidance": {"guider": hfnoise.AdaptiveGuidance()}, "projected-guidance": {"guider":
        hfnoise.ProjectedGuidance()}, "golden-noise": {"initial_noise": net}, "one-more-step": {"initial_noise": step},
    }  # fmt: skip
    for name, slot in slots.items():
        expected[name] = images(hfnoise.GuidedStableDiffusionPipeline.from_pipe(pipe, **slot))
        upload(name, ROOT / "model_cards" / name)

    clean = {"prompt": [f"p{i}" for i in range(50)], "chosen": ["a"] * 50, "rejected": ["b"] * 50}
    noisy = flip_labels(Dataset.from_dict(clean), flip_rate=0.3, seed=1)
    noisy.push_to_hub("noisy-pairs")
    metadata_update("tester/noisy-pairs", {"hfnoise": {"flip_rate": 0.3, "seed": 1}}, repo_type="dataset")
    expected["noisy-pairs"] = noisy.to_list()
    collect_noise_pairs(
        pipe, [PROMPT, "the digit one"], output_dir="npd", num_inference_steps=2, guidance_scale=1.0
    ).to_parquet("npd.parquet")
    upload("npd", "npd", "dataset")
    upload("traces", ROOT / "model_cards" / "arithmetic-trace-pairs", "dataset")

    Path("blocks").mkdir()
    Path("blocks/block.py").write_text(BLOCK)
    sys.path.insert(0, "blocks")
    from block import RefinedLatents

    RefinedLatents().save_pretrained("blocks")
    upload("blocks", "blocks")
    torch.save(expected, "expected.pt")


def pull():
    """Pull each in another process, those for stock code before hfnoise is there."""
    import json

    import datasets
    from diffusers import DiffusionPipeline, ModularPipelineBlocks, UNet2DConditionModel
    from huggingface_hub import DatasetCard
    from transformers import AutoModelForCausalLM

    expected = torch.load("expected.pt")
    found = {"quest-dense": torch.equal(logits(AutoModelForCausalLM.from_pretrained("tester/quest-dense")),
                                        expected["quest-dense"])}  # fmt: skip
    for name, local in (("noisy-pairs", None), ("npd", "npd.parquet"), ("traces", "traces")):
        rows = datasets.load_dataset(f"tester/{name}")
        if name == "noisy-pairs":
            found[name] = rows["train"].to_list() == expected[name] and 5 < sum(rows["train"]["flipped"]) < 25
            card = DatasetCard.load(f"tester/{name}").data.to_dict()
            found[name] &= card["hfnoise"] == {"flip_rate": 0.3, "seed": 1}
        elif name == "npd":
            found[name] = rows["train"].to_list() == datasets.Dataset.from_parquet(local).to_list()
        else:
            there = datasets.load_dataset(str(ROOT / "model_cards" / "arithmetic-trace-pairs"))
            found[name] = {split: rows[split].to_list() for split in rows} == {
                split: there[split].to_list() for split in there
            }
    assert "hfnoise" not in sys.modules

    import hfnoise

    found["quest-unet"] = torch.equal(
        predicted(UNet2DConditionModel.from_pretrained("tester/quest-unet")), expected["quest-unet"]
    )
    for load in (hfnoise.AutoGuider, hfnoise.AdaptiveGuidance):
        guider = load.from_pretrained("tester/guider")
        found["guider"] = guider.threshold == 0.97 and type(guider.inner) is hfnoise.ProjectedGuidance
    net, step = hfnoise.NPNet.from_pretrained("tester/npnet"), hfnoise.OneMoreStep.from_pretrained("tester/oms")
    alone = hfnoise.TimeFreeUNet2DConditionModel.from_pretrained("tester/oms-module")
    found["npnet"] = same(net, expected["npnet"])
    found["oms"] = same(step.module, expected["oms"]) and step.eta == 0.25
    found["oms-module"] = same(alone, expected["oms"])
    given = {
        "adaptive-guidance": {"guider": hfnoise.AdaptiveGuidance()}, "projected-guidance": {"guider":
        hfnoise.ProjectedGuidance()}, "golden-noise":
        {"npnet": "tester/npnet"}, "one-more-step": {"oms_module": "tester/oms"},
    }  # fmt: skip
    for name, options in given.items():
        pipe = DiffusionPipeline.from_pretrained(
            "tester/digits", custom_pipeline=f"tester/{name}", trust_remote_code=True, **options
        )
        found[name] = torch.equal(images(pipe), expected[name])
    try:
        ModularPipelineBlocks.from_pretrained("tester/blocks")
        found["blocks"] = False
    except ValueError as error:
        found["blocks"] = "trust_remote_code" in str(error)
    blocks = ModularPipelineBlocks.from_pretrained("tester/blocks", trust_remote_code=True)
    found["blocks"] &= "initial_noise" in blocks.component_names
    print(json.dumps(found))


def same(module, weights):
    here = module.state_dict()
    return here.keys() == weights.keys() and all(torch.equal(value, weights[name]) for name, value in here.items())
