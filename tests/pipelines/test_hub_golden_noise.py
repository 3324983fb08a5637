"""Golden noise on the loopback Hub: a network alone, with its pipeline, and an official checkpoint."""

import textwrap

import pytest

pytestmark = [pytest.mark.hub, pytest.mark.slow]  # a fresh process that imports all libraries

RUN = """
    import os, torch
    torch.set_num_threads(1)
    import diffusers, hfnoise
    from huggingface_hub import HfApi
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("the digit seven", num_inference_steps=2, output_type="latent", generator=generator).images

    def refined(pipe, net):
        return images(hfnoise.GuidedStableDiffusionPipeline.from_pipe(pipe, initial_noise=net))
"""

PUSH = """
    stock = new_digits_pipeline(width=8)
    torch.manual_seed(0)
    net = hfnoise.NPNet(sample_size=8, num_tokens=8, encoder_hid_dim=64, swin_image_size=16, swin_patch_size=2,
                        swin_window_size=2, swin_embed_dim=8, swin_depths=[1, 1], swin_num_heads=[1, 2])
    ours = hfnoise.NoisePromptNet(encoder_hid_dim=64, pooled_dim=8, map_size=4, hidden_channels=8, scale=0.5)
    torch.nn.init.normal_(ours.map.weight)
    torch.save([refined(stock, one) for one in (net, ours)], "images.pt")
    net.push_to_hub("npnet")
    hfnoise.GuidedStableDiffusionPipeline.from_pipe(stock, initial_noise=ours).push_to_hub("digits")
    files = set(HfApi().list_repo_files("tester/digits"))
    assert files >= {"npnet/config.json", "npnet/diffusion_pytorch_model.safetensors"}
    # As the official ones are: one file, a dictionary of dictionaries.
    parts = {"unet_svd": {}, "unet_embedding": {}, "text_embedding": {}}
    for name, value in net.state_dict().items():
        part, _, rest = name.partition(".")
        parts.update({name: value}) if not rest else parts[part].update({rest: value})
    parts["embeeding"] = parts.pop("text_embedding")
    torch.save(parts, "official.pth")
    HfApi().create_repo("tester/official")
    HfApi().upload_file(repo_id="tester/official", path_or_fileobj="official.pth", path_in_repo="official.pth")
"""

PULL = """
    with_npnet, with_ours = torch.load("images.pt")
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained("tester/digits")
    assert type(pipe.initial_noise) is hfnoise.NoisePromptNet and pipe.initial_noise.scale == 0.5
    assert torch.equal(images(pipe), with_ours)
    stock = diffusers.StableDiffusionPipeline.from_pretrained("tester/digits")
    assert torch.equal(refined(stock, hfnoise.NoisePromptNet.from_pretrained("tester/digits")), with_ours)
    net = hfnoise.NPNet.from_pretrained("tester/npnet")
    assert torch.equal(refined(stock, net), with_npnet)
    official = hfnoise.NPNet.from_single_file("tester/official", num_tokens=8)
    assert type(official) is hfnoise.NPNet and official.config.svd_sign == "lapack"
    address = os.environ["HF_ENDPOINT"] + "/tester/official/blob/main/official.pth"
    for one in (official, hfnoise.NPNet.from_single_file(address, num_tokens=8)):
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in one.state_dict().items())
    for wrong, message in ((("tester/official",), "NPNet.from_single_file"), (("tester/digits",), "NoisePromptNet")):
        try:
            hfnoise.NPNet.from_pretrained(*wrong)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{wrong} is no NPNet")
"""


def test_over_the_hub(run_python):
    run_python("".join(map(textwrap.dedent, (RUN, PUSH, PULL))))
