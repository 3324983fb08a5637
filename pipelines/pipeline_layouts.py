"""stub until the survey lands"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineLayout:
    kind: str
    scale_name: str = "guidance_scale"
    cond_first: bool = False
    denoisers: tuple[str, ...] = ("unet",)
    controlnets: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    not_batched: tuple[str, ...] = ()
    negated: bool = False
    reason: str = ""


LAYOUTS = {
    "StableDiffusionPipeline": PipelineLayout("batched"),
    "StableDiffusionXLPipeline": PipelineLayout("batched"),
    "StableDiffusionImg2ImgPipeline": PipelineLayout("batched"),
    "StableDiffusionInpaintPipeline": PipelineLayout("batched"),
    "StableDiffusionControlNetPipeline": PipelineLayout("batched", controlnets=("controlnet",)),
    "StableDiffusionInstructPix2PixPipeline": PipelineLayout("three_branches"),
    "WanPipeline": PipelineLayout("two_calls", denoisers=("transformer", "transformer_2")),
    "FluxPipeline": PipelineLayout("two_calls", "true_cfg_scale", denoisers=("transformer",)),
}


def layout_of(pipeline_class: type) -> PipelineLayout | None:
    return next((LAYOUTS[base.__name__] for base in pipeline_class.__mro__ if base.__name__ in LAYOUTS), None)
