"""THE table of benchmarks: `hfnoise bench`, the report and its tests follow from it; a new one is a row of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hfnoise.benchmarks import (
    compare_guidance,
    compare_latents,
    compare_preference,
    compare_privacy,
    compare_quantization,
)
from hfnoise.benchmarks.comparison import Comparison

SIZES = ("small", "full")
# That a benchmark compares with where they are installed; hfnoise needs none of them.
PEER_PACKAGES = ("opacus", "torchao", "bitsandbytes")
# In the order of the report. Those of methods.py, with the two kinds of diffusion noise by what is changed.
FAMILIES = {
    "preference": "Noisy preference labels",
    "privacy": "Privacy noise",
    "quantization": "Quantisation noise",
    "guidance": "Guidance of diffusion models",
    "latents": "Noise that diffusion starts from",
}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with its settings; its results are `name.json` (and .md and .png).

    Args:
        name (`str`): of the benchmark and of its files.
        module (`str`): in hfnoise.benchmarks, with `main(arguments)`.
        family (`str`): key of `FAMILIES`.
        question (`str`): what it answers.
        full (`str`): command line of the run that the documentation quotes.
        small (`str`): command line of a run of at most a minute of one core, to see that it works and the direction.
        compare (`Callable`, *optional*): takes the JSON and returns ratios to stock classes and to peers.
        pictures (`Sequence[str]`): stems of what is drawn besides.
        writes (`str`, *optional*): stem that the module gives its files, if it is not `name`.
        limits (`str`): what it does not show, or shows against us; without figures.
    """

    name: str
    module: str
    family: str
    question: str
    full: str
    small: str
    compare: Callable[[dict[str, Any]], list[Comparison]] | None = None
    pictures: Sequence[str] = ()
    writes: str = ""
    limits: str = ""

    def arguments(self, size: str) -> list[str]:
        """Return the command line of a size, without the folder."""
        return shlex.split(self.small if size == "small" else self.full)

    @property
    def path(self) -> str:
        """The module, as `python -m` takes it."""
        return f"hfnoise.benchmarks.{self.module}"

    @property
    def stem(self) -> str:
        """The stem of the files that the module writes."""
        return self.writes or self.name


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        "preference_noise_trainer", "preference_noise", "preference",
        "How many held-out pairs does a whole training run get wrong when labels are flipped?",
        full="--parts trainer", small="--parts trainer --trainer_seeds 1 --trainer_rates 0.3 --trainer_pairs 128"
        " --trainer_methods DPO 'TRL robust, true rate' 'RobustDPO, rate unknown'",
        compare=compare_preference.trainer,
        limits="Flips do not depend on the pair here; where they do, every loss of the table is wrong.",
    ),
    Benchmark(
        "preference_noise_features", "preference_noise", "preference",
        "The same for every loss, on frozen features, at five flip rates; is the flip rate estimated?",
        full="--parts features --seeds 6", small="--parts features --seeds 1 --pairs 200",
        compare=compare_preference.features,
    ),
    Benchmark(
        "preference_noise_overhead", "preference_noise", "preference",
        "What does a step cost beside TRL's own loss?",
        full="--parts overhead --steps 40", small="--parts overhead --steps 4 --losses sym",
        compare=compare_preference.overhead,
    ),
    Benchmark(
        "dr_dpo", "dr_dpo", "preference",
        "Does the gradient of Dr. DPO depend on how the batch is split, and what do flipped pairs weigh in it?",
        full="", small="--splits 1x1x16", compare=compare_preference.dr_dpo,
    ),
    Benchmark(
        "prefix_sharing", "prefix_sharing", "preference",
        "Are four answers of a prompt in one row cheaper than padded or packed rows?",
        full="", small="--prompts 1 --repeats 1 --hidden 64 --layers 2 --vocabulary 512",
        compare=compare_preference.prefix_sharing,
    ),
    Benchmark(
        "bvpo_runs", "bvpo", "preference",
        "Does BVPO's estimated share give better answers than DPO on both kinds of answers?",
        full="--parts runs", small="--parts runs --seeds 1 --pairs 320 --shares auto 'union = DPO on both (0.5)'",
        compare=compare_preference.bvpo_runs,
        limits="The estimated share has less error in the gradient and gives no better answers than plain DPO"
        " on both.",
    ),
    Benchmark(
        "bvpo_gradients", "bvpo", "preference",
        "How far is the gradient from that of many traces?",
        full="--parts gradients", small="--parts gradients --prompts 8", compare=compare_preference.bvpo_gradients,
    ),
    Benchmark(
        "displacement", "displacement", "preference",
        "What does CHES cost, and does it say which pairs lose likelihood?",
        full="", small="--pairs 100 --seeds 1 --rounds 2", compare=compare_preference.displacement,
    ),
    Benchmark(
        "dp_docstrings", "dp_docstrings", "privacy",
        "What does privacy cost in perplexity, and what do canaries still give away?",
        full="--seeds 0 1", small="--seeds 0 --epsilons 8 --rows 400 --canaries 20 --batch 64 --steps 4",
        compare=compare_privacy.docstrings,
        limits="Privacy has its price with every library; it is smaller with more rows and larger batches.",
    ),
    Benchmark(
        "dp_step_time", "dp_step_time", "privacy",
        "What do clipped per-row gradients cost beside an ordinary LoRA step and Opacus?",
        full="", small="--repeats 3 --cases 4 5", compare=compare_privacy.step_time,
    ),
    Benchmark(
        "dp_trainer_time", "dp_trainer_time", "privacy",
        "What does a whole step of the private Trainer cost?",
        full="--repeats 2",
        small="--kinds trl.SFTTrainer DPSFTTrainer --repeats 1 --steps 1 2 --batch 64 --rows 640",
        compare=compare_privacy.trainer_time,
    ),
    Benchmark(
        "fedsvd", "fedsvd", "privacy",
        "Does FedSVD learn more than other federated LoRA, without privacy and with it?",
        full="--seeds 0 1 2 3 4",
        small="--seeds 0 --rounds 2 --rate 0.667"
        " --methods FedAvg 'FFA-LoRA (orthonormal)' FedEx-LoRA FedSVD",
        compare=compare_privacy.fedsvd,
        limits="Under SGD, FedSVD is FFA-LoRA with orthonormal rows, by a theorem and to the bit; refreshing"
        " costs bytes.",
    ),
    Benchmark(
        "fedsvd_rotation", "fedsvd_rotation", "privacy",
        "What does FedSVD's refactorisation cost, by the Gram matrix and by SVD?",
        full="", small="--repeats 10 --svd_repeats 1 --cases '1024 x 1024, r = 8'", compare=compare_privacy.rotation,
    ),
    Benchmark(
        "quantization_training", "quantization_training", "quantization",
        "What loss does a model trained from scratch at 4, 2 and 1 bits end at?",
        full="--seeds 0 1 2", small="--seeds 0 --steps 20 --weight_bits 1 --step_rates 0.1",
        compare=compare_quantization.training,
        limits="A small model on little text: it shows that training is stable, not which width to pick.",
    ),
    Benchmark(
        "quantization_kernels", "quantization_kernels", "quantization",
        "How fast is a layer of 1 to 4 bits on a CPU?",
        full="", small="--repeats 3 --threads 1", compare=compare_quantization.kernels,
        limits="On a CPU; no kernel of ours was measured on a GPU. At 4 bits other libraries are faster for"
        " one token.",
    ),
    Benchmark(
        "quantization_step_time", "quantization_step_time", "quantization",
        "What does a training step of a quantised layer cost?",
        full="", small="--repeats 5 --widths 512 1024 --tokens 512 --bits 1 4",
        compare=compare_quantization.step_time,
    ),
    Benchmark(
        "quantization_size", "quantization_size", "quantization",
        "How large is the file?",
        full="", small="", compare=compare_quantization.size,
    ),
    Benchmark(
        "guidance_digits", "guidance_digits", "guidance",
        "What do skipped evaluations save, and what do they change?",
        full="", small="--seeds 0 --images 30 --fitted_images 20 --steps 20 --scales 4 --timed_images 10 --repeats 1",
        compare=compare_guidance.digits, pictures=("guidance_pictures_digits",),
        limits="Fewer steps of full guidance come nearer to it at as many evaluations.",
    ),
    Benchmark(
        "guidance_digits_20_steps", "guidance_digits", "guidance",
        "How much of the wall-clock do skipped evaluations save?",
        full="--steps 20 --scales 4",
        small="--seeds 0 --images 10 --fitted_images 10 --steps 20 --scales 4 --timed_images 20 --repeats 2",
        compare=compare_guidance.wall_clock, writes="guidance_digits",
    ),
    Benchmark(
        "guidance_coloured_digits", "guidance_digits", "guidance",
        "The same on prompts that are harder: colour, digit, thickness.",
        full="--checkpoint coloured-digits-sd --steps 20 --scales 4 7.5",
        small="--checkpoint coloured-digits-sd --seeds 0 --images 20 --fitted_images 10 --steps 20 --scales 4"
        " --timed_images 4 --repeats 1",
        compare=compare_guidance.digits, pictures=("guidance_pictures_coloured_digits",),
        limits="Skipping costs accuracy where prompts are hard.",
    ),
    Benchmark(
        "guidance_mixture", "guidance_mixture", "guidance",
        "Where the denoiser is exact: how far from full guidance at how many evaluations?",
        full="", small="--seeds 0 --samples 40", compare=compare_guidance.mixture,
    ),
    Benchmark(
        "guidance_saturation_digits", "guidance_saturation", "guidance",
        "How much does a high guidance scale saturate, by CFG, by diffusers' APG and by ours?",
        full="", small="--seeds 0 --images 20 --scales 4 15", compare=compare_guidance.saturation,
    ),
    Benchmark(
        "guidance_saturation_coloured_digits", "guidance_saturation", "guidance",
        "The same on harder prompts.",
        full="--checkpoint coloured-digits-sd",
        small="--checkpoint coloured-digits-sd --seeds 0 --images 20 --scales 4 15",
        compare=compare_guidance.saturation,
        limits="Less saturation is no more accuracy: the paper's options of diffusers' APG draw more images right.",
    ),
    Benchmark(
        "guidance_exactness", "guidance_exactness", "guidance",
        "Is a guider that never stops the stock pipeline, to the bit, in every family?",
        full="", small="--families sd-ddim sdxl sd3 flux wan-2.1", compare=None,
    ),
    Benchmark(
        "guidance_overhead", "guidance_overhead", "guidance",
        "What does a guider add to a step, when the denoiser costs nothing?",
        full="", small="--tiny --size 16 --steps 20 --repeats 5 --unet_repeats 3", compare=compare_guidance.overhead,
    ),
    Benchmark(
        "one_more_step", "one_more_step", "latents",
        "How wrong is the brightness of samples, where the base model is exactly right?",
        full="", small="--preset small --schedulers DDIM --seeds 0", compare=compare_latents.one_more_step,
        limits="A base that is trained again at zero terminal SNR repairs more, where one can be trained.",
    ),
    Benchmark(
        "one_more_step_digits", "one_more_step_digits", "latents",
        "The same on drawn digits, with a real autoencoder and UNet.",
        full="", small="--images 16 --scales 1 --seeds 0", compare=compare_latents.one_more_step_digits,
        limits="Prompts in mid brightness have no error to repair; the terminal prior makes them scatter too much.",
    ),
    Benchmark(
        "one_more_step_overhead", "one_more_step_overhead", "latents",
        "What does One More Step add to the time and the memory of a call?",
        full="", small="--steps 2 --rounds 1", compare=compare_latents.one_more_step_overhead,
    ),
    Benchmark(
        "golden_noise_digits", "golden_noise", "latents",
        "Do refined starts draw better than plain ones at equal numbers of evaluations?",
        full="", small="--preset small", compare=compare_latents.golden_noise,
        pictures=("golden_noise_pictures_digits",),
        limits="Plain guidance with fewer steps does about as well at as many evaluations.",
    ),
    Benchmark(
        "golden_noise_digits_weak", "golden_noise", "latents",
        "The same for a model that draws badly.",
        full="--checkpoint digits-sd-weak", small="--preset small --checkpoint digits-sd-weak",
        compare=compare_latents.golden_noise, pictures=("golden_noise_pictures_digits_weak",),
        limits="For a weak model plain guidance with fewer steps does better at as many evaluations.",
    ),
    Benchmark(
        "noise_search", "noise_search", "latents",
        "What does a search over starts buy for its evaluations?",
        full="", small="--seeds 0 --images 20 --budgets 2 4", compare=compare_latents.noise_search,
        limits="The best of several plain images beats both other searches at equal evaluations.",
    ),
    Benchmark(
        "diffusion_trainer", "diffusion_trainer", "latents",
        "What does a step of DiffusionTrainer cost beside a loop written by hand?",
        full="", small="--pairs 1 --steps 2 6", compare=compare_latents.diffusion_trainer,
    ),
    Benchmark(
        "start_gaps", "start_gaps", "latents",
        "Which families of models start from noise that they never saw?",
        full="", small="", compare=None,
    ),
)  # fmt: skip
