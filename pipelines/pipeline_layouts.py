"""How each pipeline of diffusers runs classifier-free guidance: a table by class name that imports no pipeline.

An interceptor around the denoiser leaves out unconditional rows and returns `u' = c - update` in their place, so that
the pipeline's own line of guidance computes what a guider wants. That needs two things to hold, which were read in the
source of diffusers 0.42 for every class here: the line gives `c` where `u' = c`, and `c + (w - 1) update` otherwise.
What is done to the guided value afterwards is marked `rescaled`; where the line is another one, the class is refused.

Departures that need no mark, because both properties hold: Lumina guides the first three of its channels only;
Kandinsky 2 and DeepFloyd IF keep the variance channels of `c`; Stable Cascade and Wuerstchen use `torch.lerp`;
CogVideoX's `use_dynamic_cfg`, Stable Video Diffusion and `guidance_scale_2` of Wan change `w` within a run or a video;
Stable Diffusion 3 adds `c - skipped` of a third call (`skip_layers=...`, B rows: to be passed through).
"""

from __future__ import annotations

from dataclasses import dataclass

from hfnoise.pipelines.refused_pipelines import REFUSED

KINDS = ("batched", "two_calls", "three_branches", "native", "unguided", "refused")
UNCOND_CALLS = ("cache_context", "same_input", "order")


@dataclass(frozen=True)
class PipelineLayout:
    """How a pipeline class calls its denoiser under classifier-free guidance, with B samples and scale `w`.

    Args:
        kind (`str`): `"batched"`: one call with 2B rows, [uncond, cond] unless `cond_first`; `"two_calls"`: B rows
            each, always cond first; `"three_branches"`: one call with 3B rows [text, image, uncond]; `"native"`: takes
            a guider as a component; `"unguided"`: has no unconditional branch (distilled, embedded guidance, none);
            `"refused"`: see `reason`.
        scale_name (`str`, default `"guidance_scale"`): the argument of `__call__` that sets `w`.
        scale_offset (`int`, default 0): `w` is that argument plus this: 1 where the line is `c + s (c - u)`.
        cond_first (`bool`, default False): batched as [cond, uncond].
        uncond_call (`str`): how the second of two calls is known. `"cache_context"`: the pipeline announces both by
            `cache_context("cond")` and `cache_context("uncond")`; `"same_input"`: it gets the very `hidden_states`
            object of the first; `"order"`: neither, its input is another tensor (a cast copy, another conditioning),
            and it is only the second call since `scheduler.step`.
        denoisers (`tuple[str, ...]`): the components that are called; at a time only one of several.
        controlnets (`tuple[str, ...]`): components that are called before each call of the denoiser with the same rows
            (with the B cond rows under `guess_mode`). Those of Flux and Qwen-Image run once for both calls and are
            not named; those of AnimateDiff see frames as rows and are not named.
        repeated (`tuple[str, ...]`): arguments of the denoiser whose first dimension is k times its rows, row by row.
        rows_second (`tuple[str, ...]`): arguments whose rows are the second dimension (the first: layers of a model).
        not_batched (`tuple[str, ...]`): arguments whose first dimension is never the rows, though it may be as long.
        negated (`bool`, default False): the pipeline negates the guided value, so that the output is minus a velocity.
        x0_from_scheduler (`bool`, default True): the formula of `pipe.scheduler`, applied to what goes into the
            denoiser and comes out of it, gives x0. Not where the pipeline preconditions, where tokens stand at several
            noise levels, or where sigmas grow (`invert_sigmas`): there only `space="model"` measures what it says.
        rescaled (`bool`, default False): with the default arguments the guided value is brought to the norm of `c`
            afterwards. Skipping is not touched by it (`c` stays `c`), the size of a projected update is.
        restarts (`bool`, default False): one `__call__` may run the whole schedule several times (segments of a video,
            FreeInit): a guider's state begins anew with each.
        reason (`str`): of a refused class: why, and what to do instead.

    Raises:
        ValueError: for another kind, or an `uncond_call` that is unknown or missing.

    Example:
        >>> from hfnoise.pipelines.pipeline_layouts import LAYOUTS
        >>> LAYOUTS["WanPipeline"].denoisers
        ('transformer', 'transformer_2')
        >>> LAYOUTS["KandinskyPriorPipeline"].kind
        'batched'
    """

    kind: str
    scale_name: str = "guidance_scale"
    scale_offset: int = 0
    cond_first: bool = False
    uncond_call: str = ""
    denoisers: tuple[str, ...] = ("unet",)
    controlnets: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    rows_second: tuple[str, ...] = ()
    not_batched: tuple[str, ...] = ()
    negated: bool = False
    x0_from_scheduler: bool = True
    rescaled: bool = False
    restarts: bool = False
    reason: str = ""

    def __post_init__(self) -> None:
        # Users write layouts too: for pipelines of their own.
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.uncond_call not in (UNCOND_CALLS if self.kind == "two_calls" else ("",)):
            raise ValueError(
                f"uncond_call must be one of {', '.join(UNCOND_CALLS)} for two_calls, and left out otherwise, got "
                f"{self.uncond_call!r} for {self.kind!r}."
            )


def layout_of(pipeline_class: type) -> PipelineLayout | None:
    """Return the layout of a pipeline class, or of its nearest base class that has one; None if none has.

    A subclass that writes its own `__call__` is taken at its base's word.

    Args:
        pipeline_class (`type`): of diffusers, or derived from one.

    Example:
        >>> from hfnoise.pipelines.pipeline_layouts import layout_of
        >>> class DiTPipeline: ...  # diffusers' own, or
        >>> class MyPipeline(DiTPipeline): ...
        >>> layout_of(MyPipeline).cond_first
        True
        >>> layout_of(int) is None
        True
    """
    return next((LAYOUTS[base.__name__] for base in pipeline_class.__mro__ if base.__name__ in LAYOUTS), None)


_UNET = PipelineLayout("batched")
_CONTROLNET = PipelineLayout("batched", controlnets=("controlnet",))
_TRANSFORMER_ONLY = ("transformer",)
_ROTARY = ("image_rotary_emb",)
_POSITIONS = ("img_ids", "txt_ids")
# The text is repeated for every frame, and so are the residuals of the controlnet.
_FRAMES = ("encoder_hidden_states", "down_block_additional_residuals", "mid_block_additional_residual")


def _transformer(not_batched: tuple[str, ...] = (), **fields: object) -> PipelineLayout:
    return PipelineLayout("batched", denoisers=_TRANSFORMER_ONLY, not_batched=not_batched, **fields)  # type: ignore[arg-type]


def _two_calls(uncond_call: str, not_batched: tuple[str, ...] = (), **fields: object) -> PipelineLayout:
    fields = {"denoisers": _TRANSFORMER_ONLY, "uncond_call": uncond_call, "not_batched": not_batched, **fields}
    return PipelineLayout("two_calls", **fields)  # type: ignore[arg-type]


_INDICES = (
    "indices_hidden_states indices_latents_history_short indices_latents_history_mid indices_latents_history_long"
)
_FRAMEPACK = "indices_latents indices_latents_clean indices_latents_history_2x indices_latents_history_4x"
# Lists of positions along each axis, as long as the video has frames.
_KANDINSKY5 = ("visual_rope_pos", "text_rope_pos", "scale_factor", "sparse_params")
_BOTH_TRANSFORMERS = ("transformer", "transformer_2")

_GROUPS: tuple[tuple[PipelineLayout, str], ...] = (
    (
        _UNET,
        """
        StableDiffusionPipeline StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline
        StableDiffusionDepth2ImgPipeline StableDiffusionImageVariationPipeline StableDiffusionUpscalePipeline
        StableDiffusionAdapterPipeline StableDiffusionDiffEditPipeline StableDiffusionGLIGENPipeline
        StableDiffusionLDM3DPipeline StableDiffusionModelEditingPipeline StableDiffusionControlNetXSPipeline
        StableUnCLIPPipeline StableUnCLIPImg2ImgPipeline PaintByExamplePipeline BlipDiffusionPipeline
        AltDiffusionPipeline AltDiffusionImg2ImgPipeline LDMTextToImagePipeline
        StableDiffusionXLPipeline StableDiffusionXLImg2ImgPipeline StableDiffusionXLInpaintPipeline
        StableDiffusionXLAdapterPipeline StableDiffusionXLControlNetXSPipeline KolorsPipeline KolorsImg2ImgPipeline
        KandinskyPipeline KandinskyImg2ImgPipeline KandinskyInpaintPipeline KandinskyV22Pipeline
        KandinskyV22Img2ImgPipeline KandinskyV22InpaintPipeline KandinskyV22ControlnetPipeline
        KandinskyV22ControlnetImg2ImgPipeline
        IFPipeline IFImg2ImgPipeline IFInpaintingPipeline IFSuperResolutionPipeline IFImg2ImgSuperResolutionPipeline
        IFInpaintingSuperResolutionPipeline
        AudioLDMPipeline AudioLDM2Pipeline MusicLDMPipeline
        TextToVideoSDPipeline VideoToVideoSDPipeline I2VGenXLPipeline
        """,
    ),
    (
        _CONTROLNET,
        """
        StableDiffusionControlNetPipeline StableDiffusionControlNetImg2ImgPipeline
        StableDiffusionControlNetInpaintPipeline StableDiffusionXLControlNetPipeline
        StableDiffusionXLControlNetImg2ImgPipeline StableDiffusionXLControlNetInpaintPipeline
        StableDiffusionXLControlNetUnionPipeline StableDiffusionXLControlNetUnionImg2ImgPipeline
        StableDiffusionXLControlNetUnionInpaintPipeline BlipDiffusionControlNetPipeline
        """,
    ),
    (PipelineLayout("batched", x0_from_scheduler=False), "StableDiffusionLatentUpscalePipeline"),
    # w grows over the frames, from min_guidance_scale to this.
    (PipelineLayout("batched", scale_name="max_guidance_scale"), "StableVideoDiffusionPipeline"),
    (PipelineLayout("batched", scale_offset=1), "Kandinsky3Pipeline Kandinsky3Img2ImgPipeline"),
    (
        PipelineLayout("batched", repeated=_FRAMES, restarts=True),
        """
        AnimateDiffPipeline AnimateDiffSDXLPipeline AnimateDiffControlNetPipeline AnimateDiffSparseControlNetPipeline
        AnimateDiffVideoToVideoPipeline AnimateDiffVideoToVideoControlNetPipeline PIAPipeline
        """,
    ),
    (
        PipelineLayout("batched", denoisers=("image_unet",)),
        """
        VersatileDiffusionTextToImagePipeline VersatileDiffusionImageVariationPipeline
        VersatileDiffusionDualGuidedPipeline
        """,
    ),
    # The output is an embedding: one vector of a sample, or rows of one with a second half that is thrown away.
    (
        PipelineLayout("batched", denoisers=("prior",)),
        """
        KandinskyPriorPipeline KandinskyV22PriorPipeline KandinskyV22PriorEmb2EmbPipeline
        ShapEPipeline ShapEImg2ImgPipeline
        """,
    ),
    (
        PipelineLayout("batched", denoisers=("prior",), cond_first=True),
        "StableCascadePriorPipeline WuerstchenPriorPipeline",
    ),
    (
        PipelineLayout("batched", denoisers=("decoder",), cond_first=True),
        "StableCascadeDecoderPipeline WuerstchenDecoderPipeline",
    ),
    (
        _transformer(),
        """
        StableDiffusion3Pipeline StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline AuraFlowPipeline
        PixArtAlphaPipeline PixArtSigmaPipeline CogView3PlusPipeline SanaPipeline SanaVideoPipeline
        ErnieImagePipeline PRXPipeline LattePipeline EasyAnimatePipeline EasyAnimateControlPipeline
        EasyAnimateInpaintPipeline LTXPipeline StableAudio3Pipeline
        """,
    ),
    (
        _transformer(controlnets=("controlnet",)),
        "StableDiffusion3ControlNetPipeline StableDiffusion3ControlNetInpaintingPipeline SanaControlNetPipeline",
    ),
    (
        _transformer(_ROTARY),
        """
        AllegroPipeline HunyuanDiTPipeline CogVideoXPipeline CogVideoXImageToVideoPipeline
        CogVideoXVideoToVideoPipeline CogVideoXFunControlPipeline
        """,
    ),
    (_transformer((*_ROTARY, "id_cond", "id_vit_hidden")), "ConsisIDPipeline"),
    (_transformer(_ROTARY, controlnets=("controlnet",)), "HunyuanDiTControlNetPipeline"),
    (_transformer(_POSITIONS), "BriaPipeline BriaFiboPipeline BriaFiboEditPipeline"),
    (_transformer(("rotary_embedding",)), "StableAudioPipeline"),
    (_transformer(cond_first=True), "DiTPipeline"),
    (_transformer(_ROTARY, cond_first=True, negated=True), "LuminaPipeline"),
    (_transformer(rows_second=("encoder_hidden_states_llama3",), negated=True), "HiDreamImagePipeline"),
    # The conditioning frames stand at another noise level; the average velocity of a flow map; x0 is put out as such;
    # sigmas that grow.
    (
        _transformer(x0_from_scheduler=False),
        """
        LTXImageToVideoPipeline LTXConditionPipeline SanaImageToVideoPipeline SanaWMPipeline
        AnyFlowPipeline PRXPixelPipeline MochiPipeline
        """,
    ),
    (_transformer(x0_from_scheduler=False, restarts=True), "LTXI2VLongMultiPromptPipeline"),
    (
        _two_calls("cache_context"),
        "CogView4Pipeline SkyReelsV2Pipeline SkyReelsV2ImageToVideoPipeline",
    ),
    (
        _two_calls("cache_context", denoisers=_BOTH_TRANSFORMERS),
        "WanPipeline WanImageToVideoPipeline LucyEditPipeline",
    ),
    # One strength per layer of the control branch.
    (
        _two_calls("cache_context", ("control_hidden_states_scale",), denoisers=_BOTH_TRANSFORMERS),
        "WanVACEPipeline",
    ),
    (_two_calls("cache_context", restarts=True), "WanAnimatePipeline"),
    (_two_calls("cache_context", tuple(_INDICES.split()), restarts=True), "HeliosPipeline"),
    (_two_calls("cache_context", scale_name="true_cfg_scale"), "HunyuanVideoPipeline"),
    (_two_calls("cache_context", _POSITIONS, scale_name="true_cfg_scale"), "FluxPipeline"),
    (
        _two_calls("cache_context", _POSITIONS),
        "Flux2KleinPipeline Flux2KleinInpaintPipeline LongCatImageEditPipeline OvisImagePipeline",
    ),
    (_two_calls("cache_context", _POSITIONS, rescaled=True), "LongCatImagePipeline"),
    (
        _two_calls("cache_context", scale_name="true_cfg_scale", rescaled=True),
        """
        QwenImagePipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline QwenImageControlNetPipeline
        QwenImageControlNetInpaintPipeline QwenImageEditPipeline QwenImageEditInpaintPipeline
        QwenImageEditPlusPipeline
        """,
    ),
    (_two_calls("cache_context", scale_name="true_cfg_scale"), "QwenImageLayeredPipeline"),
    # GLM-Image calls its transformer once for every conditioning image before the first step.
    (
        _two_calls("same_input"),
        "CogView4ControlPipeline GlmImagePipeline ChronoEditPipeline WanVideoToVideoPipeline BriaFibo2Pipeline",
    ),
    (_two_calls("same_input", _POSITIONS), "ChromaPipeline ChromaImg2ImgPipeline ChromaInpaintPipeline"),
    (
        _two_calls("same_input", _POSITIONS, scale_name="true_cfg_scale"),
        """
        FluxImg2ImgPipeline FluxInpaintPipeline FluxControlNetPipeline FluxKontextPipeline
        FluxKontextInpaintPipeline
        """,
    ),
    (
        _two_calls("same_input", scale_name="true_cfg_scale"),
        "HunyuanVideoImageToVideoPipeline HunyuanSkyreelsImageToVideoPipeline",
    ),
    (_two_calls("same_input", rescaled=True), "JoyImageEditPipeline"),
    (_two_calls("same_input", rescaled=True, negated=True), "Lumina2Pipeline NucleusMoEImagePipeline"),
    (_two_calls("same_input", ("position_ids",), scale_offset=1), "Krea2Pipeline"),
    (_two_calls("same_input", x0_from_scheduler=False), "LongCatAudioDiTPipeline"),
    (
        _two_calls("same_input", scale_offset=1, x0_from_scheduler=False),
        "CosmosTextToWorldPipeline Cosmos2TextToImagePipeline Cosmos2_5_PredictBasePipeline",
    ),
    (
        _two_calls("same_input", scale_offset=1, x0_from_scheduler=False, controlnets=("controlnet",), restarts=True),
        "Cosmos2_5_TransferPipeline",
    ),
    (
        _two_calls("order", scale_offset=1, x0_from_scheduler=False),
        "CosmosVideoToWorldPipeline Cosmos2VideoToWorldPipeline",
    ),
    (
        _two_calls("order", _KANDINSKY5),
        "Kandinsky5T2IPipeline Kandinsky5I2IPipeline Kandinsky5T2VPipeline Kandinsky5I2VPipeline",
    ),
    (
        _two_calls("order", tuple(_FRAMEPACK.split()), scale_name="true_cfg_scale", restarts=True),
        "HunyuanVideoFramepackPipeline",
    ),
    (
        PipelineLayout("three_branches"),
        "StableDiffusionInstructPix2PixPipeline StableDiffusionXLInstructPix2PixPipeline",
    ),
    # HunyuanImage takes `ocr_guider` instead of `guider` where the prompt quotes a text.
    (
        PipelineLayout("native", denoisers=_TRANSFORMER_ONLY),
        """
        HunyuanImagePipeline HunyuanImageRefinerPipeline HunyuanVideo15Pipeline HunyuanVideo15ImageToVideoPipeline
        MotifVideoPipeline MotifVideoImage2VideoPipeline
        """,
    ),
    (
        PipelineLayout("unguided"),
        """
        DDIMPipeline DDPMPipeline PNDMPipeline LDMPipeline LDMSuperResolutionPipeline ScoreSdeVePipeline
        KarrasVePipeline RePaintPipeline ConsistencyModelPipeline DanceDiffusionPipeline AudioDiffusionPipeline
        SpectrogramDiffusionPipeline LatentConsistencyModelPipeline LatentConsistencyModelImg2ImgPipeline
        MarigoldDepthPipeline MarigoldIntrinsicsPipeline MarigoldNormalsPipeline DreamLiteMobilePipeline
        """,
    ),
    (
        PipelineLayout("unguided", denoisers=_TRANSFORMER_ONLY),
        """
        FluxControlPipeline FluxControlImg2ImgPipeline FluxControlInpaintPipeline FluxFillPipeline
        FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline Flux2Pipeline Flux2KleinKVPipeline
        VisualClozeGenerationPipeline SanaSprintPipeline SanaSprintImg2ImgPipeline StableAudio3AudioToAudioPipeline
        StableAudio3InpaintPipeline LTX2DFRPipeline LTX2DFRTemporalRefinePipeline Kandinsky6SRPipeline
        RFD4ProteinaPipeline
        """,
    ),
    # Two pipelines in one that are both unguided; encoders and upsamplers without a loop; text models.
    (
        PipelineLayout("unguided", denoisers=()),
        """
        VisualClozePipeline FluxPriorReduxPipeline LTXLatentUpsamplePipeline LTX2LatentUpsamplePipeline
        LTX2VideoDiffusionDecodePipeline DiffusionGemmaPipeline LLaDA2Pipeline
        """,
    ),
)

LAYOUTS: dict[str, PipelineLayout] = {
    **{name: layout for layout, names in _GROUPS for name in names.split()},
    **{name: PipelineLayout("refused", reason=reason) for reason, names in REFUSED for name in names.split()},
}
