"""Initial noises on the loopback Hub: with a pipeline, alone, and in an official repository that points elsewhere."""

import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.hub, pytest.mark.slow]  # fresh processes that import all libraries

CARD = Path(__file__).parents[2] / "model_cards" / "one-more-step"

RUN = """
    import copy, json, os, torch
    torch.set_num_threads(1)
    import diffusers, hfnoise
    from huggingface_hub import HfApi, ModelCard
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    PRIOR = {"mean": [0.1, 0.0, 0.0, 1 / 3], "covariance": (0.04 * torch.eye(4)).tolist()}

    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("the digit seven", num_inference_steps=3, output_type="latent", generator=generator).images
"""

PUSH = """
    stock = new_digits_pipeline(width=8)
    torch.save(images(stock), "stock.pt")
    module = hfnoise.TimeFreeUNet2DConditionModel.from_config(new_digits_pipeline(width=8).unet.config)
    step = hfnoise.OneMoreStep(module.eval(), eta=0.25)
    pipe = hfnoise.OneMoreStepPipeline.from_pipe(stock, initial_noise=step)
    torch.save(images(pipe), "ours.pt")
    pipe.push_to_hub("digits")
    files = set(HfApi().list_repo_files("tester/digits"))
    assert files >= {f"oms_module/{name}" for name in
                     ("config.json", "one_more_step.json", "diffusion_pytorch_model.safetensors")}

    # A chain with everything, and its variant beside it; a part that is gone is deleted.
    text = new_digits_pipeline(width=8, seed=1)
    own = hfnoise.OneMoreStep(module, text_encoder=text.text_encoder, tokenizer=text.tokenizer)
    pipe.initial_noise = [own, hfnoise.TerminalPrior(PRIOR, 0.5), hfnoise.BrightnessOffset(0.3)]
    torch.save(images(pipe), "chain.pt")
    pipe.push_to_hub("chain")
    half = hfnoise.OneMoreStep(copy.deepcopy(module), text_encoder=copy.deepcopy(own.text_encoder),
                               tokenizer=own.tokenizer).to(torch.bfloat16)
    pipe.initial_noise = [half, *pipe.initial_noise.members[1:]]
    pipe.push_to_hub("chain", variant="bf16")
    card = ModelCard.load("tester/chain")
    assert "## Initial noise" in card.text and card.data.tags == ["diffusers", "hfnoise", "one-more-step"]
    files = set(HfApi().list_repo_files("tester/chain"))
    weights = {"oms_module/diffusion_pytorch_model", "oms_module/text_encoder/model", "unet/diffusion_pytorch_model"}
    assert files >= {f"{name}{variant}.safetensors" for name in weights for variant in ("", ".bf16")}
    pipe.initial_noise = [step, *pipe.initial_noise.members[1:]]
    pipe.push_to_hub("fewer")
    pipe.initial_noise = [own]
    pipe.push_to_hub("fewer")
    files = set(HfApi().list_repo_files("tester/fewer"))
    assert "oms_module/text_encoder/model.safetensors" in files and not any("initial_noise" in name for name in files)
    pipe.initial_noise = step
    pipe.push_to_hub("fewer")
    assert not any("oms_module/text_encoder" in name for name in HfApi().list_repo_files("tester/fewer"))
    pipe.initial_noise = None
    pipe.save_pretrained("local", push_to_hub=True, repo_id="tester/fewer")
    assert not any("oms_module" in name for name in HfApi().list_repo_files("tester/fewer"))
    assert "Initial noise" not in ModelCard.load("tester/fewer").text

    # As the official ones are: weights of a variant only, text parts that are named and not there.
    stock.save_pretrained("base")
    HfApi().create_repo("tester/base")
    HfApi().upload_folder(repo_id="tester/base", folder_path="base")
    module.save_pretrained("official/oms_module", variant="fp16")
    for name, place in (("oms_text_encoder", "text_encoder"), ("oms_tokenizer", "tokenizer")):
        os.makedirs(f"official/{name}")
        with open(f"official/{name}/config.json", "w") as stream:
            json.dump({"_name_or_path": "tester/base", "subfolder": place}, stream)
    HfApi().create_repo("tester/custom")
    HfApi().upload_folder(repo_id="tester/custom", folder_path=os.environ["CARD"])
    HfApi().create_repo("tester/official")
    HfApi().upload_folder(repo_id="tester/official", folder_path="official")
"""

PULL = """
    pipe = hfnoise.OneMoreStepPipeline.from_pretrained("tester/digits")
    assert pipe.initial_noise.eta == 0.25
    assert torch.equal(images(pipe), torch.load("ours.pt"))
    assert type(hfnoise.AutoGuidedPipeline.from_pretrained("tester/digits").initial_noise).__name__ == "OneMoreStep"
    stock = diffusers.StableDiffusionPipeline.from_pretrained("tester/digits")
    assert torch.equal(images(stock), torch.load("stock.pt"))
    alone = hfnoise.OneMoreStep.from_pretrained("tester/digits")
    pipe = hfnoise.OneMoreStepPipeline.from_pipe(stock, initial_noise=alone)
    assert torch.equal(images(pipe), torch.load("ours.pt"))

    for load in (hfnoise.AutoGuidedPipeline, hfnoise.GuidedStableDiffusionPipeline):
        pipe = load.from_pretrained("tester/chain")
        assert len(pipe.initial_noise.members) == 3 and torch.equal(images(pipe), torch.load("chain.pt"))
    stock = diffusers.StableDiffusionPipeline.from_pretrained("tester/chain")
    assert torch.equal(images(stock), torch.load("stock.pt"))
    again = hfnoise.AutoGuidedPipeline.from_pretrained("tester/chain", variant="bf16", dtype=torch.bfloat16)
    weights = again.initial_noise.members[0].module.state_dict()
    first = pipe.initial_noise.members[0].module.state_dict()
    assert all(torch.equal(weights[name], first[name].bfloat16()) for name in first)
    offline = hfnoise.AutoGuidedPipeline.from_pretrained("tester/chain", local_files_only=True)
    assert torch.equal(images(offline), torch.load("chain.pt"))
    assert hfnoise.AutoGuidedPipeline.from_pretrained("tester/fewer").initial_noise is None
    custom = diffusers.DiffusionPipeline.from_pretrained(
        "tester/fewer", custom_pipeline="tester/custom", trust_remote_code=True, oms_module="tester/digits"
    )
    assert torch.equal(images(custom), torch.load("ours.pt"))

    official = hfnoise.OneMoreStep.from_pretrained("tester/official", variant="fp16", eta=0.25)
    assert type(official.text_encoder).__name__ == "CLIPTextModel" and official.tokenizer.model_max_length == 8
    again = images(hfnoise.OneMoreStepPipeline.from_pipe(stock, initial_noise=official))
    torch.testing.assert_close(again, torch.load("ours.pt"), rtol=1e-3, atol=1e-3)
    try:
        hfnoise.OneMoreStep.from_pretrained("tester/official")
    except OSError as error:
        assert "diffusion_pytorch_model" in str(error), error
    else:
        raise AssertionError("the variant is not asked for, and found")
"""


def test_over_the_hub(run_python):
    for part in (PUSH, PULL):
        run_python(textwrap.dedent(RUN) + textwrap.dedent(part), {"CARD": str(CARD)})
