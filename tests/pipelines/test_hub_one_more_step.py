"""One More Step on the loopback Hub: with its pipeline, alone, and in an official repository that points elsewhere."""

import textwrap

import pytest

pytestmark = [pytest.mark.hub, pytest.mark.slow]  # fresh processes that import all libraries

RUN = """
    import json, torch
    torch.set_num_threads(1)
    import diffusers, hfnoise
    from huggingface_hub import HfApi
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

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

    # As the official ones are: weights of a variant only, text parts that are named and not there.
    stock.save_pretrained("base")
    HfApi().create_repo("tester/base")
    HfApi().upload_folder(repo_id="tester/base", folder_path="base")
    module.save_pretrained("official/oms_module", variant="fp16")
    for name, place in (("oms_text_encoder", "text_encoder"), ("oms_tokenizer", "tokenizer")):
        __import__("os").makedirs(f"official/{name}")
        with open(f"official/{name}/config.json", "w") as stream:
            json.dump({"_name_or_path": "tester/base", "subfolder": place}, stream)
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
        run_python(textwrap.dedent(RUN) + textwrap.dedent(part))
