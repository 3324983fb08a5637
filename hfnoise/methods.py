"""THE table: one row per method. Command line, lazy names, cards, README table and contract tests follow from it.

To add a method: append a row here, write one math function, one HF class and one test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from hfnoise.citations import (
    ADAPTIVE_GUIDANCE_BIBTEX,
    APG_BIBTEX,
    BVPO_BIBTEX,
    DP_SGD_BIBTEX,
    DR_DPO_BIBTEX,
    FEDSVD_BIBTEX,
    GOLDEN_NOISE_BIBTEX,
    ONE_MORE_STEP_BIBTEX,
    QUEST_BIBTEX,
    ROBUST_DPO_BIBTEX,
)
from hfnoise.golden_noise_options import GOLDEN_NOISE_OPTIONS
from hfnoise.guidance_options import ADAPTIVE_GUIDANCE_OPTIONS, PROJECTED_GUIDANCE_OPTIONS
from hfnoise.latents_options import ONE_MORE_STEP_OPTIONS
from hfnoise.options import (
    BVPO_OPTIONS,
    DP_OPTIONS,
    DR_DPO_OPTIONS,
    FEDSVD_OPTIONS,
    NOISE_DPO_OPTIONS,
    QAT_OPTIONS,
    ROBUST_DPO_OPTIONS,
    Option,
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method: where its code is, what users type, what its card says.

    Args:
        name: the sub-command, `hfnoise <name>`.
        family: `preference`, `privacy`, `quantization`, `guidance` or `latents`.
        title: one line for tables.
        paper: arXiv identifier.
        module: where `exports` live; imported only when one of them is used.
        exports: public names, importable from `hfnoise`.
        config: the class of our configuration, a public name.
        trainer: the Trainer among the exports, of a method that trains.
        guider: the guider among the exports, of a method that guides a pipeline of diffusers.
        launch: `module:function` that runs the sub-command, given the list of arguments.
        options: our options, beyond those of the stock configuration.
        stock: what a user would pick without us.
        state: `ready` or `planned`.
        tags: Hub tags of what the method produces.
        bibtex: citation for the card.
    """

    name: str
    family: str
    title: str
    paper: str
    module: str
    exports: tuple[str, ...]
    config: str
    trainer: str = ""
    guider: str = ""
    launch: str
    options: tuple[Option, ...]
    stock: str
    state: str
    tags: tuple[str, ...]
    bibtex: str

    @property
    def main_class(self) -> str:
        """The class that users write."""
        return self.trainer or self.guider


METHODS: tuple[Method, ...] = (
    Method(
        name="noise-dpo",
        family="preference",
        title="DPO with any mixture of noise-robust pair losses",
        paper="2403.00409",
        module="hfnoise.trainers.noise_dpo",
        exports=("NoiseDPOConfig", "NoiseDPOTrainer"),
        config="NoiseDPOConfig",
        trainer="NoiseDPOTrainer",
        launch="hfnoise.trainers.launch:train_preference",
        options=NOISE_DPO_OPTIONS,
        stock="trl.DPOTrainer",
        state="ready",
        tags=("hfnoise", "dpo", "noisy-labels"),
        bibtex=ROBUST_DPO_BIBTEX,
    ),
    Method(
        name="robust-dpo",
        family="preference",
        title="Robust DPO: learn from flipped preference labels, with the flip rate known or not",
        paper="2403.00409",
        module="hfnoise.trainers.robust_dpo",
        exports=("RobustDPOConfig", "RobustDPOTrainer"),
        config="RobustDPOConfig",
        trainer="RobustDPOTrainer",
        launch="hfnoise.trainers.launch:train_preference",
        options=ROBUST_DPO_OPTIONS,
        stock="trl.DPOTrainer with loss_type='robust'",
        state="ready",
        tags=("hfnoise", "robust-dpo", "dpo", "noisy-labels"),
        bibtex=ROBUST_DPO_BIBTEX,
    ),
    Method(
        name="dr-dpo",
        family="preference",
        title="Dr. DPO: pairs weighted over the global batch, with no extra forward pass",
        paper="2407.07880",
        module="hfnoise.trainers.dr_dpo",
        exports=("DrDPOConfig", "DrDPOTrainer"),
        config="DrDPOConfig",
        trainer="DrDPOTrainer",
        launch="hfnoise.trainers.launch:train_preference",
        options=DR_DPO_OPTIONS,
        stock="none in TRL; the official code weighs each micro-batch alone",
        state="ready",
        tags=("hfnoise", "dr-dpo", "dpo", "noisy-labels"),
        bibtex=DR_DPO_BIBTEX,
    ),
    Method(
        name="bvpo",
        family="preference",
        title="BVPO: reasoning models on sampled traces, with the best share of answers without",
        paper="2510.05095",
        module="hfnoise.trainers.bvpo",
        exports=("BVPOConfig", "BVPOTrainer", "DataCollatorForTracePreference"),
        config="BVPOConfig",
        trainer="BVPOTrainer",
        launch="hfnoise.trainers.launch:train_preference",
        options=BVPO_OPTIONS,
        stock="trl.DPOTrainer on both datasets, which is the share 0.5",
        state="ready",
        tags=("hfnoise", "bvpo", "dpo", "reasoning"),
        bibtex=BVPO_BIBTEX,
    ),
    Method(
        name="dp-sft",
        family="privacy",
        title="Differentially private supervised fine-tuning, at the cost of a normal step",
        paper="1607.00133",
        module="hfnoise.trainers.private",
        exports=("DPSFTTrainer",),
        config="DPConfig",
        trainer="DPSFTTrainer",
        launch="hfnoise.trainers.launch_private:train_private",
        options=DP_OPTIONS,
        stock="trl.SFTTrainer, with Opacus by hand",
        state="ready",
        tags=("hfnoise", "dp-sft", "dp-sgd", "differential-privacy", "sft"),
        bibtex=DP_SGD_BIBTEX,
    ),
    Method(
        name="dp-dpo",
        family="privacy",
        title="Differentially private DPO: the pair, or all pairs of an annotator, is what is protected",
        paper="1607.00133",
        module="hfnoise.trainers.private",
        exports=("DPDPOTrainer",),
        config="DPConfig",
        trainer="DPDPOTrainer",
        launch="hfnoise.trainers.launch_private:train_private",
        options=DP_OPTIONS,
        stock="trl.DPOTrainer, with Opacus by hand",
        state="ready",
        tags=("hfnoise", "dp-dpo", "dp-sgd", "differential-privacy", "dpo"),
        bibtex=DP_SGD_BIBTEX,
    ),
    Method(
        name="fedsvd",
        family="privacy",
        title="FedSVD: clients train one LoRA adapter together, each with its own epsilon, by tiny messages",
        paper="2505.12805",
        module="hfnoise.trainers.federated",
        exports=("FedSVDTrainer",),
        config="FedSVDConfig",
        trainer="FedSVDTrainer",
        launch="hfnoise.trainers.launch_federated:train_federated",
        options=FEDSVD_OPTIONS,
        stock="trl.SFTTrainer, on data that was brought together",
        state="ready",
        tags=("hfnoise", "fedsvd", "federated", "differential-privacy"),
        bibtex=FEDSVD_BIBTEX,
    ),
    Method(
        name="qat",
        family="quantization",
        title="QuEST: train with weights and activations at 1 to 8 bits, and save them at those",
        paper="2502.05003",
        module="hfnoise.trainers.qat",
        exports=("QATTrainer", "QATTrainerMixin"),
        config="QATTrainingArguments",
        trainer="QATTrainer",
        launch="hfnoise.trainers.launch_qat:train_quantized",
        options=QAT_OPTIONS,
        stock="transformers.Trainer, in full precision",
        state="ready",
        tags=("hfnoise", "quest", "quantization-aware-training"),
        bibtex=QUEST_BIBTEX,
    ),
    Method(
        name="adaptive-guidance",
        family="guidance",
        title="Adaptive Guidance: no unconditional evaluation for samples that need none any more",
        paper="2312.12487",
        module="hfnoise.pipelines.adaptive_guidance",
        exports=("AdaptiveGuidance", "AdaptiveGuidancePipeline"),
        config="GenerateConfig",
        guider="AdaptiveGuidance",
        launch="hfnoise.pipelines.generate:main_of_guider",
        options=ADAPTIVE_GUIDANCE_OPTIONS,
        stock="diffusers.callbacks.SDXLCFGCutoffCallback: one step for all, one image at a time",
        state="ready",
        tags=("hfnoise", "adaptive-guidance", "classifier-free-guidance"),
        bibtex=ADAPTIVE_GUIDANCE_BIBTEX,
    ),
    Method(
        name="projected-guidance",
        family="guidance",
        title="APG as published: strong guidance that does not saturate, in any pipeline",
        paper="2410.02416",
        module="hfnoise.pipelines.projected_guidance",
        exports=("ProjectedGuidance", "ProjectedGuidancePipeline"),
        config="GenerateConfig",
        guider="ProjectedGuidance",
        launch="hfnoise.pipelines.generate:main_of_guider",
        options=PROJECTED_GUIDANCE_OPTIONS,
        stock="diffusers.AdaptiveProjectedGuidance, in modular pipelines, not on x0",
        state="ready",
        tags=("hfnoise", "apg", "classifier-free-guidance"),
        bibtex=APG_BIBTEX,
    ),
    Method(
        name="one-more-step",
        family="latents",
        title="One More Step: images as dark and as bright as the prompt says, the base model as it is",
        paper="2311.15744",
        module="hfnoise.trainers.one_more_step",
        exports=("OneMoreStepTrainer", "OneMoreStepTrainingArguments"),
        config="OneMoreStepTrainingArguments",
        trainer="OneMoreStepTrainer",
        launch="hfnoise.trainers.launch_one_more_step:train_module",
        options=ONE_MORE_STEP_OPTIONS,
        stock="a base model that was trained again: with offset noise, or with zero terminal SNR",
        state="ready",
        tags=("hfnoise", "one-more-step", "diffusers", "diffusers-training"),
        bibtex=ONE_MORE_STEP_BIBTEX,
    ),
    Method(
        name="golden-noise",
        family="latents",
        title="Golden noise: a small network that turns noise into noise that suits the prompt",
        paper="2411.09502",
        module="hfnoise.trainers.noise_prompt",
        exports=("NoisePromptTrainer", "NoisePromptTrainingArguments"),
        config="NoisePromptTrainingArguments",
        trainer="NoisePromptTrainer",
        launch="hfnoise.trainers.launch_golden_noise:train_golden_noise",
        options=GOLDEN_NOISE_OPTIONS,
        stock="plain noise, with more guidance or the best of several seeds",
        state="ready",
        tags=("hfnoise", "golden-noise", "diffusers", "diffusers-training"),
        bibtex=GOLDEN_NOISE_BIBTEX,
    ),
)

# Public names that belong to no single method: name -> module.
SHARED_EXPORTS: dict[str, str] = {
    "AutoGuidedPipeline": "hfnoise.pipelines.auto_guided",
    "AutoGuider": "hfnoise.pipelines.guiders",
    "BrightnessOffset": "hfnoise.pipelines.brightness_offset",
    "ConditioningNoise": "hfnoise.pipelines.conditioning_noise",
    "GenerateConfig": "hfnoise.pipelines.generate_config",
    "GuidanceRecorder": "hfnoise.pipelines.guiders",
    "GuidanceReport": "hfnoise.pipelines.guidance_report",
    "InitialNoise": "hfnoise.pipelines.initial_noise",
    "InitialNoiseBlock": "hfnoise.pipelines.modular_start",
    "InitialNoiseChain": "hfnoise.pipelines.noise_chain",
    "LinearGuidance": "hfnoise.pipelines.guiders",
    "NPNet": "hfnoise.pipelines.noise_nets",
    "NoisePromptNet": "hfnoise.pipelines.noise_nets",
    "NoiseLevelGuidance": "hfnoise.pipelines.noise_level",
    "OneMoreStep": "hfnoise.pipelines.one_more_step",
    "OneMoreStepPipeline": "hfnoise.pipelines.one_more_step_preset",
    "ReDenoise": "hfnoise.pipelines.redenoise",
    "SeedVariation": "hfnoise.pipelines.seed_variation",
    "StartGap": "hfnoise.pipelines.gap",
    "TerminalPrior": "hfnoise.pipelines.terminal_prior",
    "TimeFreeUNet2DConditionModel": "hfnoise.latents.hf_time_free_unet",
    "UpdateGuidance": "hfnoise.pipelines.guiders",
    "GoldenNoisePipeline": "hfnoise.pipelines.golden_noise",
    "NoisePairRows": "hfnoise.trainers.noise_prompt_rows",
    "PairDiagnosis": "hfnoise.latents.pair_diagnosis",
    "PromptRows": "hfnoise.trainers.noise_prompt_rows",
    "StartComparison": "hfnoise.pipelines.start_comparison",
    "PathSearch": "hfnoise.pipelines.path_search",
    "RandomSearch": "hfnoise.pipelines.random_search",
    "SearchTrace": "hfnoise.pipelines.search_trace",
    "ZeroOrderSearch": "hfnoise.pipelines.zero_order_search",
    "clip_verifier": "hfnoise.pipelines.image_text_verifier",
    "collect_noise_pairs": "hfnoise.pipelines.noise_pairs",
    "compare_starts": "hfnoise.pipelines.start_comparison",
    "convert_npnet_checkpoint": "hfnoise.latents.hf_npnet_checkpoints",
    "diagnose_pairs": "hfnoise.latents.pair_diagnosis",
    "digit_verifier": "hfnoise.worlds.digits_verifier",
    "few_step_reward": "hfnoise.pipelines.few_step_reward",
    "load_noise_net": "hfnoise.pipelines.noise_nets",
    "named_verifier": "hfnoise.pipelines.named_verifiers",
    "guide": "hfnoise.pipelines.guided",
    "guided_class": "hfnoise.pipelines.guided",
    "start_gap": "hfnoise.pipelines.gap",
    "with_initial_noise": "hfnoise.pipelines.modular_start",
    "DiffusionTrainer": "hfnoise.trainers.diffusion",
    "DiffusionTrainingArguments": "hfnoise.trainers.diffusion_arguments",
    "LossWeighting": "hfnoise.latents",
    "ResidualStatistics": "hfnoise.latents",
    "convert_oms_checkpoint": "hfnoise.latents.hf_checkpoints",
    "encode_prompts": "hfnoise.trainers.diffusion_latents",
    "load_oms_components": "hfnoise.latents.hf_checkpoints",
    "precompute_latents": "hfnoise.trainers.diffusion_latents",
    "ClientDropout": "hfnoise.trainers.federated",
    "FedSVDClient": "hfnoise.trainers.federated",
    "FedSVDConfig": "hfnoise.trainers.federated_config",
    "FedSVDServer": "hfnoise.trainers.federated",
    "freeze_lora_A": "hfnoise.trainers.federated",
    "simulate_federation": "hfnoise.trainers.federated",
    "DPConfig": "hfnoise.trainers.private_config",
    "DPTrainer": "hfnoise.trainers.private",
    "DPTrainerMixin": "hfnoise.trainers.private",
    "FlipRateEstimate": "hfnoise.preference",
    "PairContext": "hfnoise.preference",
    "ches_scores": "hfnoise.preference",
    "dp_audit": "hfnoise.trainers.private_audit",
    "dp_check": "hfnoise.trainers.private",
    "dp_tune": "hfnoise.trainers.private_tuning",
    "estimate_flip_rate": "hfnoise.preference",
    "filter_by_ches": "hfnoise.preference",
    "ExportPackedCallback": "hfnoise.trainers.qat_export",
    "QATArguments": "hfnoise.trainers.qat_config",
    "QATSFTConfig": "hfnoise.trainers.qat_sft",
    "QATSFTTrainer": "hfnoise.trainers.qat_sft",
    "QATTrainingArguments": "hfnoise.trainers.qat_config",
    "QuestConfig": "hfnoise.quantization.hf_config",
    "dequantize": "hfnoise.quantization.hf_export",
    "export_packed": "hfnoise.quantization.hf_export",
    "prepare_qat": "hfnoise.quantization.hf_export",
    "quantization_report": "hfnoise.quantization.report",
    "flip_labels": "hfnoise.preference",
    "make_canaries": "hfnoise.trainers.private_canaries",
    "make_private": "hfnoise.trainers.private",
    "make_trace_pairs": "hfnoise.trainers.trace_pairs",
    "pair_loss": "hfnoise.preference",
    "register_pair_loss": "hfnoise.preference",
    "score_dataset": "hfnoise.trainers.score_pairs",
}


@cache
def public_names() -> dict[str, str]:
    """Return every lazily importable public name and the module it lives in.

    Example:
        >>> from hfnoise.methods import public_names
        >>> public_names()["RobustDPOTrainer"]
        'hfnoise.trainers.robust_dpo'
    """
    return SHARED_EXPORTS | {name: method.module for method in METHODS for name in method.exports}


def find_method(name: str) -> Method:
    """Return the row of that name.

    Raises:
        ValueError: if there is none; the message lists the names.

    Example:
        >>> from hfnoise.methods import find_method
        >>> find_method("robust-dpo").paper
        '2403.00409'
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise ValueError(f"unknown method {name!r}; known are {', '.join(method.name for method in METHODS)}.")
