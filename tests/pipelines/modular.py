"""The denoising loops of two real modular pipelines, with tiny random models: flow matching (Wan) and eps (SDXL)."""

from functools import cache

import torch

# diffusers is imported inside: its pipelines take seconds, which the default suite would pay when it collects.

STEPS = 6


def spread_out(model):
    """Random weights large enough that prompts matter: at the initial ones both predictions are nearly the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / fan_in**0.5)
    return model.eval().requires_grad_(False)


@cache
def wan():
    from diffusers import WanTransformer3DModel

    return spread_out(
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )  # fmt: skip
    )


@cache
def unet():
    from diffusers import UNet2DConditionModel

    return spread_out(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            norm_num_groups=4,
            transformer_layers_per_block=(1, 1),
        )  # fmt: skip
    )


class Loop:
    """A modular pipeline of one block, the denoising loop, called with a batch of random embeddings.

    Args:
        family: `"wan"` or `"sdxl"`.
        guider: of the pipeline; bound to it if it can be.
        samples: which of the five samples are in the batch.
    """

    def __init__(self, family, guider, samples=(0, 1, 2)):
        from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
        from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep
        from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep

        self.family, self.guider = family, guider
        block = WanDenoiseStep() if family == "wan" else StableDiffusionXLDenoiseStep()
        self.pipe = block.init_pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        self.model = wan() if family == "wan" else unet()
        if family == "wan":
            self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
            self.pipe.update_components(transformer=self.model)
        else:
            self.scheduler = EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
            )
            self.pipe.update_components(unet=self.model)
        self.pipe.update_components(scheduler=self.scheduler, guider=guider)
        if hasattr(guider, "bind"):
            guider.bind(self.pipe)
        self.samples = torch.tensor(samples)
        self.rows = []

    def draw(self, seed, *shape):
        return torch.randn(5, *shape, generator=torch.Generator().manual_seed(seed))[self.samples]

    def __call__(self, steps=STEPS):
        """Return the final latents; `rows` then holds the batch size of every call of the denoiser."""
        self.scheduler.set_timesteps(steps)
        self.rows.clear()
        shape = (4, 1, 8, 8) if self.family == "wan" else (4, 8, 8)
        common = {
            "latents": self.draw(1, *shape), "timesteps": self.scheduler.timesteps, "num_inference_steps": steps
        }  # fmt: skip
        prompts = {"prompt_embeds": self.draw(2, 5, 16), "negative_prompt_embeds": self.draw(3, 5, 16)}
        counter = self.model.register_forward_hook(lambda module, args, output: self.rows.append(len(output[0])))
        try:
            if self.family == "wan":
                return self.pipe(**common, **prompts, dtype=torch.float32, output="latents")
            common["latents"] = common["latents"] * self.scheduler.init_noise_sigma
            pooled = {"pooled_prompt_embeds": self.draw(4, 16), "negative_pooled_prompt_embeds": self.draw(5, 16)}
            ids = torch.ones(len(self.samples), 6)
            inputs = {**prompts, **pooled, "add_time_ids": ids, "negative_add_time_ids": ids}
            return self.pipe(**common, denoiser_input_fields=inputs, output="latents")
        finally:
            counter.remove()
