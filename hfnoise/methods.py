"""THE table: one row per method. Command line, lazy names, cards, README table and contract tests follow from it.

To add a method: append a row here, write one math function, one HF class and one test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Option:
    """One configuration option of ours: the single source of its help, for `--help` and for the dataclass field."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class Method:
    """One method: where its code is, what users type, what its card says.

    Args:
        name: the sub-command, `hfnoise <name>`.
        family: `preference`, `privacy`, `quantization`, `guidance` or `latents`.
        title: one line for tables.
        paper: arXiv identifier.
        module: where `exports` live; imported only when one of them is used.
        exports: public names, importable from `hfnoise`.
        config: the configuration class among the exports.
        trainer: the Trainer among the exports.
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
    trainer: str
    launch: str
    options: tuple[Option, ...]
    stock: str
    state: str
    tags: tuple[str, ...]
    bibtex: str


@dataclass(frozen=True)
class Command:
    """A sub-command that is not a method: `launch` is `module:function`, given the list of arguments."""

    name: str
    launch: str
    help: str


NOISE_DPO_OPTIONS = (
    Option(
        "flip_rate",
        "float",
        None,
        "Probability that a preference label is flipped, in [0, 0.5). TRL's label_smoothing is another name for it; "
        "two different values are refused.",
    ),
    Option(
        "flip_rate_column",
        "str",
        None,
        "Dataset column with a flip rate for each pair, in [0, 0.5); replaces flip_rate in the losses that read one.",
    ),
    Option(
        "sample_weight_column",
        "str",
        None,
        "Dataset column with a weight >= 0 for each pair; the loss is the mean of weight * loss, so weights of mean 1 "
        "keep its scale.",
    ),
    Option(
        "annotator_column",
        "str",
        None,
        "Dataset column that says who gave the label; agreement and flip rates are then given per annotator.",
    ),
    Option("holder_gamma", "float", 2.0, "Exponent of the 'holder' loss, above 0; 2 is the paper's choice."),
    Option(
        "sym_temperature",
        "float",
        1.0,
        "Unit of margin t of the 'sym' loss t (1 - sigma(h / t)), above 0: 1 is the paper's loss; a larger one learns "
        "flips less by heart.",
    ),
    Option("ropo_alpha", "float", 14.0, "Weight of the symmetric part of the 'ropo' loss, above 0."),
    Option(
        "robust_rescale",
        "bool",
        False,
        "Multiply the 'robust' loss by (1 - 2 flip_rate), so that its step size stays bounded near one half.",
    ),
    Option(
        "robust_margin_limit",
        "float",
        None,
        "Margin above which the 'robust' loss is constant; without it the loss is unbounded below.",
    ),
    Option(
        "on_nan_log_probs",
        "str",
        "raise",
        "What to do when log-probabilities are not finite: 'raise' names the pair and stops, 'skip' names it and "
        "leaves out the whole optimizer step on every process.",
    ),
    Option(
        "drop_invalid_pairs",
        "bool",
        False,
        "Drop pairs with identical answers and pairs whose prompt fills max_length, and log how many. By default they "
        "are an error.",
    ),
    Option(
        "prefix_sharing",
        "bool",
        False,
        "Compute the prompt of a pair once instead of once per answer, without padding: the same losses and gradients "
        "up to rounding, in less time where prompts are long or lengths differ. For models with plain causal "
        "attention.",
    ),
    Option(
        "compute_ches",
        "bool",
        False,
        "Add the columns 'ches' and 'ln_ches', how much each pair will displace likelihood, to the datasets in the "
        "pass that computes the reference log-probabilities; needs precompute_ref_log_probs=True.",
    ),
)

ROBUST_DPO_OPTIONS = (
    Option(
        "flip_rate",
        "float or 'auto'",
        "auto",
        "Probability that a preference label is flipped, in [0, 0.5). 'auto' trains with the loss 'sym', which needs "
        "no rate, and estimates the rate from the margins of the evaluation pairs after training.",
    ),
    *(option for option in NOISE_DPO_OPTIONS if option.name not in ("flip_rate", "sym_temperature")),
    Option(
        "sym_temperature",
        "float",
        4.0,
        "Unit of margin t of the 'sym' loss t (1 - sigma(h / t)), above 0. 1 is the paper's loss; 4 learned fewer "
        "flips by heart in our benchmark.",
    ),
    Option(
        "audit_column",
        "str",
        None,
        "Boolean column of the evaluation dataset: true where a re-labelled pair disagrees with the recorded label, "
        "empty where a pair was not audited. The best source of a flip rate.",
    ),
)

DR_DPO_OPTIONS = (
    *NOISE_DPO_OPTIONS,
    Option(
        "dr_beta",
        "float",
        1.0,
        "Temperature of the weights exp(-loss / dr_beta), at least 0.01145: a large one is DPO, a small one trusts "
        "only pairs that the model agrees with already.",
    ),
    Option(
        "dr_scope",
        "str",
        "global",
        "'global' weighs the pairs of the whole batch, over processes, accumulation and per-device batch; "
        "'micro_batch' those of each per-device batch, as the official code does.",
    ),
)

BVPO_OPTIONS = (
    Option(
        "trace_alpha",
        "float or 'auto'",
        "auto",
        "Share of the loss with traces, in [0, 1]: 0.5, the paper's choice, is plain DPO on both kinds of answers; "
        "'auto' estimates the share of least gradient error while training.",
    ),
    Option("alpha_decay", "float", 0.95, "Decay of the moving averages behind trace_alpha 'auto', in [0, 1)."),
    Option("alpha_min", "float", 0.05, "trace_alpha 'auto' stays in [alpha_min, 1 - alpha_min]; above 0, below 0.5."),
    Option("alpha_every", "int", 4, "Optimizer steps between two estimates of trace_alpha 'auto'."),
    Option(
        "max_length",
        "int",
        4096,
        "Tokens of prompt and answer with its trace; rows that exceed it are dropped and counted, never cut.",
    ),
    *NOISE_DPO_OPTIONS,
)

_ROBUST_DPO_BIBTEX = """\
@inproceedings{chowdhury2024provably,
    title     = {{Provably Robust DPO: Aligning Language Models with Noisy Feedback}},
    author    = {Sayak Ray Chowdhury and Anush Kini and Nagarajan Natarajan},
    booktitle = {Proceedings of the 41st International Conference on Machine Learning},
    year      = {2024},
    url       = {https://arxiv.org/abs/2403.00409},
}"""

_DR_DPO_BIBTEX = """\
@inproceedings{wu2025towards,
    title     = {{Towards Robust Alignment of Language Models: Distributionally Robustifying Direct Preference
                 Optimization}},
    author    = {Junkang Wu and Yuexiang Xie and Zhengyi Yang and Jiancan Wu and Jiawei Chen and Jinyang Gao and
                 Bolin Ding and Xiang Wang and Xiangnan He},
    booktitle = {The Thirteenth International Conference on Learning Representations},
    year      = {2025},
    url       = {https://arxiv.org/abs/2407.07880},
}"""

_BVPO_BIBTEX = """\
@article{zhu2025from,
    title   = {{From Noisy Traces to Stable Gradients: Bias-Variance Optimized Preference Optimization for Aligning
               Large Reasoning Models}},
    author  = {Mingkang Zhu and Xi Chen and Bei Yu and Hengshuang Zhao and Jiaya Jia},
    year    = {2025},
    eprint  = {arXiv:2510.05095},
}"""

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
        bibtex=_ROBUST_DPO_BIBTEX,
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
        bibtex=_ROBUST_DPO_BIBTEX,
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
        bibtex=_DR_DPO_BIBTEX,
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
        bibtex=_BVPO_BIBTEX,
    ),
)

# Public names that belong to no single method: name -> module.
SHARED_EXPORTS: dict[str, str] = {
    "FlipRateEstimate": "hfnoise.preference",
    "PairContext": "hfnoise.preference",
    "ches_scores": "hfnoise.preference",
    "estimate_flip_rate": "hfnoise.preference",
    "filter_by_ches": "hfnoise.preference",
    "flip_labels": "hfnoise.preference",
    "make_trace_pairs": "hfnoise.trainers.trace_pairs",
    "pair_loss": "hfnoise.preference",
    "register_pair_loss": "hfnoise.preference",
    "score_dataset": "hfnoise.trainers.score_pairs",
}

COMMANDS: tuple[Command, ...] = (
    Command("audit-labels", "hfnoise.trainers.audit_labels:main", "estimate the flip rate of a preference dataset"),
    Command("score-pairs", "hfnoise.trainers.score_pairs:main", "CHES: which pairs DPO would displace likelihood on"),
    Command(
        "make-trace-pairs", "hfnoise.trainers.trace_pairs_run:main", "sample preference pairs with reasoning traces"
    ),
    Command("demo", "hfnoise.worlds.demo:main", "noisy labels on the embedded world: table, plot, saved model"),
    Command("bench", "hfnoise.benchmarks.preference_noise:main", "the preference-noise benchmark"),
)


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


def option_help(options: tuple[Option, ...], name: str) -> str:
    """Return the help text of an option."""
    return next(option.help for option in options if option.name == name)
