"""Denoisers with other inputs: Stable Diffusion XL and 3, Flux, a UNet without prompts, one with a variance."""

import datasets
import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from hfnoise import DiffusionTrainer
from hfnoise.trainers.diffusion_latents import encode_prompts, precompute_latents
from hfnoise.trainers.diffusion_noise import draw_training_noise
from hfnoise.worlds.digits_pipeline import new_digits_tokenizer
from hfnoise.worlds.tiny_pipelines.transformers import new_flow_scheduler
from hfnoise.worlds.tiny_pipelines.transformers import new_vae as new_sd3_vae
from hfnoise.worlds.tiny_pipelines.unets import new_scheduler, new_text_parts, new_unet, new_vae
from tests.trainers.diffusion_world import arguments, losses, make_rows, new_trainer

WIDTH, TOKENS = 16, 8
# Six numbers of size and crop, 8 wide each, and the pooled embedding.
XL_UNET = {
    "cross_attention_dim": 2 * WIDTH, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
}  # fmt: skip


def new_second_text_parts(number):
    tokenizer = new_digits_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=WIDTH, pad_token_id=0, bos_token_id=1,
        eos_token_id=3,
    )  # fmt: skip
    return {f"text_encoder{number}": CLIPTextModelWithProjection(config), f"tokenizer{number}": tokenizer}


@pytest.fixture
def pictures():
    datasets.disable_progress_bars()
    pixels = torch.linspace(-1, 1, 4 * 3 * 16 * 16).reshape(4, 3, 16, 16)
    yield datasets.Dataset.from_dict({"image": pixels.tolist(), "text": ["one", "two", "", "seven"]})
    datasets.enable_progress_bars()


# Inside diffusers, where Euler makes an array of a tensor.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.slow
def test_stable_diffusion_xl(pictures, tmp_path):
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        vae=new_vae(), unet=new_unet(**XL_UNET),
        scheduler=new_scheduler("EulerDiscreteScheduler"), **new_text_parts(), **new_second_text_parts("_2"),
        add_watermarker=False,
    )  # fmt: skip
    rows = precompute_latents(pictures, pipe)
    assert rows[3]["added_cond_kwargs.time_ids"].tolist() == [16, 16, 0, 0, 16, 16]
    states, _, pooled, _ = pipe.encode_prompt("seven", device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(rows[3]["encoder_hidden_states"], states[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[3]["added_cond_kwargs.text_embeds"], pooled[0], rtol=1e-4, atol=1e-5)
    empty = encode_prompts(pipe, [""])
    assert set(empty) == {"encoder_hidden_states", "added_cond_kwargs.text_embeds"}
    trainer = new_trainer(
        tmp_path, pipe.unet, pipe.scheduler, rows, trainer_options={"empty_prompt": empty}, prompt_dropout=0.5
    )
    trainer.train()
    trainer.save_model()
    pipe.unet = type(pipe.unet).from_pretrained(tmp_path)
    settings = {"num_inference_steps": 1, "output_type": "latent", "height": 16, "width": 16}
    assert pipe("seven", **settings).images.isfinite().all()


@pytest.mark.slow
def test_stable_diffusion_3_with_an_adapter(pictures, tmp_path):
    torch.manual_seed(0)
    shape = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 2 * WIDTH,
        "caption_projection_dim": 16, "pooled_projection_dim": 2 * WIDTH, "pos_embed_max_size": 16,
    }  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**shape), scheduler=new_flow_scheduler(),
        vae=new_sd3_vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        **new_second_text_parts(""), **new_second_text_parts("_2"), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    rows = precompute_latents(pictures, pipe)
    assert set(rows.column_names) == {"latents", "encoder_hidden_states", "pooled_projections"}
    trainer = new_trainer(
        tmp_path, pipe.transformer, pipe.scheduler, rows, timestep_sampling="logit_normal", snr_gamma=5.0,
        trainer_options={"peft_config": LoraConfig(r=2, target_modules=["to_q", "to_v"])},
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert len(set(losses(trainer))) == 3
    trained = {name: value.clone() for name, value in pipe.transformer.state_dict().items() if "lora" in name}
    pipe.transformer.delete_adapters("default")
    pipe.load_lora_weights(tmp_path, adapter_name="default")
    loaded = pipe.transformer.state_dict()
    assert trained and all(torch.equal(loaded[name], value) for name, value in trained.items())


@pytest.mark.slow
def test_a_unet_without_prompts(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=3, add_attention=False,
    )  # fmt: skip
    rows = make_rows(8).remove_columns("encoder_hidden_states").add_column("class_labels", [0, 1, 2, 0, 1, 2, 0, 1])
    trainer = new_trainer(tmp_path, unet, rows=rows)
    before = unet.class_embedding.weight.detach().clone()
    trainer.train()
    assert not torch.equal(unet.class_embedding.weight, before)


@pytest.mark.slow
def test_a_transformer_that_predicts_a_variance_too(tmp_path):
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    rows = make_rows(8).remove_columns("encoder_hidden_states").add_column("class_labels", [0, 1, 2, 0, 1, 2, 0, 1])
    trainer = new_trainer(tmp_path, dit, rows=rows)
    before = dit.proj_out_2.bias.detach().clone()
    trainer.train()
    changed = (dit.proj_out_2.bias != before).reshape(4, 8)  # four pixels of a patch, eight channels
    assert changed.any(0).tolist() == [True] * 4 + [False] * 4


@pytest.mark.slow
def test_flux_on_packed_latents(tmp_path):
    torch.manual_seed(0)
    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    columns = {
        "latents": (4, 16), "encoder_hidden_states": (3, 8), "pooled_projections": (8,), "img_ids": (4, 3),
        "txt_ids": (3, 3),
    }  # fmt: skip
    rows = datasets.Dataset.from_dict(
        {name: torch.randn(4, *shape, generator=generator).numpy() for name, shape in columns.items()}
    ).with_format("torch")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    trainer = new_trainer(tmp_path, flux, scheduler, rows, max_steps=1)
    batch = rows[:4]
    draws = draw_training_noise(3, 0, [0, 1, 2, 3], (4, 16))
    levels = (draws.level * 1000).long()
    sigmas = scheduler.sigmas[levels].reshape(-1, 1, 1)
    with torch.no_grad():
        # As pipeline_flux.py calls it: the time of the scheduler over 1000.
        prediction = flux(
            (1 - sigmas) * batch["latents"] + sigmas * draws.noise, timestep=scheduler.timesteps[levels] / 1000,
            encoder_hidden_states=batch["encoder_hidden_states"], pooled_projections=batch["pooled_projections"],
            img_ids=batch["img_ids"][0], txt_ids=batch["txt_ids"][0],
        ).sample  # fmt: skip
    expected = (prediction - (draws.noise - batch["latents"])).square().mean()
    trainer.train()
    assert losses(trainer) == pytest.approx([float(expected)], abs=2e-4)
    offset = new_trainer(tmp_path, flux, scheduler, rows, max_steps=1, noise_offset=0.1)
    with pytest.raises(ValueError, match=r"shape \(4, 16\) are packed.*Use noise_offset=0"):
        offset.train()


@pytest.mark.slow
def test_a_flow_model_of_an_unknown_convention_is_refused(tmp_path):
    class Backwards(DiTTransformer2DModel):
        pass

    model = Backwards(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4
    )
    rows = make_rows(8).remove_columns("encoder_hidden_states").add_column("class_labels", [0] * 8)
    with pytest.raises(ValueError, match="Backwards at flow matching: which sign.*Override `denoise`"):
        new_trainer(tmp_path, model, new_flow_scheduler(), rows)

    class Answered(DiffusionTrainer):
        def denoise(self, model, sample, timestep, conditions):
            return -super().denoise(model, sample, 1000 - timestep, conditions)

    trainer = Answered(model, arguments(tmp_path), scheduler=new_flow_scheduler(), train_dataset=rows)
    trainer.train()
    assert len(losses(trainer)) == 3
