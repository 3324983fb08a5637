"""Pipelines of diffusers in whose runs no interceptor around the denoiser can guide: why, and what to use instead."""

from __future__ import annotations

# (reason, names of classes)
REFUSED: tuple[tuple[str, str], ...] = (
    (
        (
            "It batches a third, perturbed branch and combines it with the other two itself; convert it by "
            "from_pipe to the pipeline without PAG."
        ),
        """
        AnimateDiffPAGPipeline HunyuanDiTPAGPipeline KolorsPAGPipeline PixArtSigmaPAGPipeline SanaPAGPipeline
        StableDiffusion3PAGPipeline StableDiffusion3PAGImg2ImgPipeline StableDiffusionPAGPipeline
        StableDiffusionPAGImg2ImgPipeline StableDiffusionPAGInpaintPipeline StableDiffusionControlNetPAGPipeline
        StableDiffusionControlNetPAGInpaintPipeline StableDiffusionXLPAGPipeline StableDiffusionXLPAGImg2ImgPipeline
        StableDiffusionXLPAGInpaintPipeline StableDiffusionXLControlNetPAGPipeline
        StableDiffusionXLControlNetPAGImg2ImgPipeline
        """,
    ),
    (
        (
            "It goes on to use the unconditional prediction, attention maps or gradients of single branches after the "
            "call; use the plain Stable Diffusion pipeline on the same weights."
        ),
        """
        StableDiffusionSAGPipeline StableDiffusionAttendAndExcitePipeline StableDiffusionPix2PixZeroPipeline
        StableDiffusionInpaintPipelineLegacy SemanticStableDiffusionPipeline StableDiffusionPipelineSafe
        LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL
        """,
    ),
    (
        (
            "Its batch is not [uncond, cond]: views, time steps, frames, or a second trajectory stand in the rows "
            "too; use the plain Stable Diffusion pipeline on the same weights."
        ),
        """
        StableDiffusionPanoramaPipeline StableDiffusionParadigmsPipeline TextToVideoZeroPipeline
        TextToVideoZeroSDXLPipeline CycleDiffusionPipeline
        """,
    ),
    (
        "It takes c from a call with grounding and u from one without; use StableDiffusionGLIGENPipeline.",
        "StableDiffusionGLIGENTextImagePipeline",
    ),
    (
        (
            "It runs an ONNX session on NumPy arrays, which no hook of torch reaches; use the torch pipeline "
            "of the same name."
        ),
        """
        OnnxStableDiffusionPipeline OnnxStableDiffusionImg2ImgPipeline OnnxStableDiffusionInpaintPipeline
        OnnxStableDiffusionUpscalePipeline OnnxStableDiffusionInpaintPipelineLegacy StableDiffusionOnnxPipeline
        """,
    ),
    (
        (
            "It only chains two pipelines that are guided separately; guide the one you mean, pipe.prior_pipe or "
            "pipe.decoder_pipe, and call the two in turn."
        ),
        """
        KandinskyCombinedPipeline KandinskyImg2ImgCombinedPipeline KandinskyInpaintCombinedPipeline
        KandinskyV22CombinedPipeline KandinskyV22Img2ImgCombinedPipeline KandinskyV22InpaintCombinedPipeline
        StableCascadeCombinedPipeline WuerstchenCombinedPipeline
        """,
    ),
    (
        (
            "It hands calls on to a pipeline that it makes inside of them; use that one, such as "
            "VersatileDiffusionTextToImagePipeline."
        ),
        "VersatileDiffusionPipeline",
    ),
    (
        (
            "It runs several models under schedulers that are not pipe.scheduler, each with a scale of its own; use "
            "StableUnCLIPPipeline or the Kandinsky 2.2 pipelines."
        ),
        "UnCLIPPipeline UnCLIPImageVariationPipeline",
    ),
    (
        (
            "It predicts probabilities of tokens, which have no x0 to project or compare; use a pipeline that "
            "denoises continuous latents."
        ),
        "AmusedPipeline AmusedImg2ImgPipeline AmusedInpaintPipeline VQDiffusionPipeline",
    ),
    (
        (
            "It puts out an image and a text, or a video, sound and actions, whose guidance would need one state "
            "each; use a pipeline of one modality, or the modular one of this family where it takes a guider."
        ),
        """
        UniDiffuserPipeline Cosmos3OmniPipeline Kandinsky6TI2VAPipeline LTX2Pipeline LTX2ConditionPipeline
        LTX2ImageToVideoPipeline LTX2InContextPipeline LTX2HDRPipeline
        """,
    ),
    (
        (
            "It gives its model lists with an entry per row, not tensors with rows; use ZImageModularPipeline, "
            "which takes a guider."
        ),
        """
        ZImagePipeline ZImageImg2ImgPipeline ZImageInpaintPipeline ZImageOmniPipeline ZImageControlNetPipeline
        ZImageControlNetInpaintPipeline
        """,
    ),
    (
        "It gives its model a list with the shape of each row; use JoyImageEditPipeline.",
        "JoyImageEditPlusPipeline",
    ),
    (
        (
            "It packs the inputs of two or three branches, the conditional one first, for all of them at once; use a "
            "pipeline of another family."
        ),
        "OmniGenPipeline",
    ),
    (
        "It keeps key-value caches of both branches from one chunk of a video to the next; use AnyFlowPipeline.",
        "AnyFlowFARPipeline",
    ),
    (
        (
            "It keeps a key-value cache of the unconditional branch from the first step on, and its prediction is "
            "the tail of the output; use QwenImage21ModularPipeline, which takes a guider."
        ),
        "QwenImage21Pipeline",
    ),
    (
        (
            "Its unconditional branch is a second network with inputs of another shape, and its modular pipeline "
            "takes no guider either; use a pipeline of another family."
        ),
        "Ideogram4Pipeline",
    ),
    (
        (
            "It has two branches for generating and three, [uncond, image, text], for editing, beside each other in "
            "width; use DreamLiteMobilePipeline, which needs no guidance, or another pipeline."
        ),
        "DreamLitePipeline",
    ),
    (
        (
            "It already computes adaptive projected guidance, with a momentum of its own, from both predictions; set "
            "its cfg_interval_start and cfg_interval_end instead to save evaluations."
        ),
        "AceStepPipeline",
    ),
    (
        (
            "It changes the resolution within a run and rescales u by CFG-Zero*, so that c - update is not what it "
            "would be given back; use HeliosPipeline."
        ),
        "HeliosPyramidPipeline",
    ),
    (
        (
            "Diffusion forcing denoises every frame at another noise level under a scheduler of its own; use "
            "SkyReelsV2Pipeline or SkyReelsV2ImageToVideoPipeline."
        ),
        """
        SkyReelsV2DiffusionForcingPipeline SkyReelsV2DiffusionForcingImageToVideoPipeline
        SkyReelsV2DiffusionForcingVideoToVideoPipeline
        """,
    ),
)
