"""The options of ours by family, beyond the stock configurations: one source for `--help` and for the fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One configuration option of ours: the single source of its help, for `--help` and for the dataclass field."""

    name: str
    type: str
    default: Any
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

DP_OPTIONS = (
    Option(
        "target_epsilon", "float", None, "Privacy budget; the noise is calibrated to it. This or noise_multiplier."
    ),
    Option(
        "noise_multiplier",
        "float",
        None,
        "Standard deviation of the noise in units of clip_norm, at least 0; epsilon follows. This or target_epsilon.",
    ),
    Option(
        "target_delta", "float", None, "Delta of the guarantee, below 1 / units; default min(1e-5, 1 / (10 units))."
    ),
    Option("clip_norm", "float", 1.0, "Norm to which the gradient of a unit is clipped, above 0."),
    Option(
        "expected_batch_size",
        "int",
        None,
        "Expected number of units in a step; default per-device batch x accumulation x processes.",
    ),
    Option(
        "micro_batch_size",
        "int",
        None,
        "Units per forward pass; default per_device_train_batch_size, or 1 with grad_mode 'loop'. Changes memory and "
        "speed, and which draws of dropout a unit gets.",
    ),
    Option(
        "unit_column",
        "str",
        None,
        "Dataset column that says whose a row is (a user, an author): what is protected is then all rows of one unit. "
        "Default: every row (every pair) is a unit of its own.",
    ),
    Option(
        "max_rows_per_unit", "int", 1, "Rows of a unit that a step may use, drawn anew each step; needs unit_column."
    ),
    Option(
        "clipping",
        "str",
        "flat",
        "'flat' clips the whole gradient of a unit, 'auto' scales it to clip_norm (no threshold to tune), 'per_layer' "
        "clips every parameter to its share.",
    ),
    Option(
        "grad_mode",
        "str",
        "leaf",
        "'leaf' takes the gradients of all units of a micro-batch from one backward pass; 'loop' takes one unit at a "
        "time, slowly, for any layer.",
    ),
    Option(
        "noise",
        "str",
        "gaussian",
        "'gaussian' is independent from step to step; 'banded' is correlated so that sums of steps are less noisy "
        "(BandMF), for plain SGD.",
    ),
    Option("bands", "int or 'auto'", "auto", "Number of bands of noise 'banded'; 'auto' takes the least total error."),
    Option("accountant", "str", "pld", "'pld' (tight) or 'rdp' (a looser bound)."),
    Option(
        "secret_file",
        "str",
        None,
        "File with the secret of the noise, made if it does not exist, outside output_dir, readable by its owner "
        "only. Default: below the Hugging Face home folder, one for each dataset.",
    ),
    Option(
        "ledger_file", "str", None, "File with what every run released of each dataset; default: beside the secret."
    ),
    Option("unsafe_seed", "int", None, "Noise from a known seed, for tests: NOT PRIVATE, and every report says so."),
    Option("accumulation_dtype", "str", "float32", "'float32' or 'float64' for the sum over the units of a step."),
    Option(
        "adam_bias_correction",
        "bool",
        False,
        "Subtract the known variance of the noise from Adam's second moment (DP-AdamBC).",
    ),
    Option(
        "log_private_metrics",
        "bool",
        False,
        "Log loss and rewards of the training data, which are outside of the guarantee.",
    ),
)


def option_help(options: tuple[Option, ...], name: str) -> str:
    """Return the help text of an option."""
    return next(option.help for option in options if option.name == name)


def option_default(options: tuple[Option, ...], name: str) -> Any:
    """Return the default of an option."""
    return next(option.default for option in options if option.name == name)


FEDSVD_OPTIONS = (
    Option(
        "aggregation", "str", "fedsvd", "How adapters are averaged: 'fedsvd', 'ffa', 'fedavg', 'flora' or 'fedex'."
    ),
    Option(
        "subspace",
        "str",
        "fixed",
        "'fixed': A spans the same rows forever, as published; 'refresh': new directions now and then (our own).",
    ),
    Option("refresh_every", "int", 10, "Rounds between two refreshes of the subspace."),
    Option("refresh_directions", "int", None, "Directions that a refresh replaces; default all."),
    Option(
        "init_lora_A",
        "str",
        "orthonormal",
        "Rows of A to start from: 'orthonormal'; 'kaiming', which is PEFT's; 'w0_svd': right singular vectors of "
        "the base weight; 'keep': those given.",
    ),
    Option("rounds", "int", 100, "Rounds of the federation."),
    Option("clients_per_round", "int", None, "Clients drawn for every round; default all."),
    Option("local_steps", "int", 10, "Optimizer steps of a client in a round."),
    Option(
        "max_participations",
        "int",
        None,
        "Rounds a client takes part in at most; its noise is calibrated to it. Default rounds x drawn / clients.",
    ),
    Option(
        "weighting",
        "str",
        "examples",
        "'examples': average by numbers of examples, which become public; 'uniform': all clients alike.",
    ),
    Option("federation_seed", "int", 0, "Public seed of the first rows and of the choice of clients."),
)

# Of the command line only: in Python the rows of the clients are datasets by name.
FEDSVD_DATA_OPTIONS = (
    Option("client_column", "str", None, "Dataset column that says whose a row is: its values are the clients."),
    Option("clients", "int", None, "Put the values of client_column together to so many clients of about one size."),
)

# Bits and estimators are those of hfnoise.QuestConfig; "of the model" means: what a model that is quantised already
# says, and the default of QuestConfig for a float one.
QAT_OPTIONS = (
    Option("weight_bits", "float", None, "Bits of a weight: 1, 1.58 (ternary), 2 to 8. Default: of the model, or 4."),
    Option(
        "activation_bits",
        "float",
        None,
        "Bits of the inputs of linear layers; without it beside weight_bits they are not quantised.",
    ),
    Option("bits", "float", None, "Sets weight_bits and activation_bits both."),
    Option(
        "trust_factor",
        "float",
        None,
        "Entries beyond it times the outermost level get no gradient. Default: 1.3 at 1 bit, else half a step beyond "
        "the outermost level.",
    ),
    Option(
        "hadamard_group",
        "int",
        None,
        "Rows are rotated in groups of the largest power of two up to it that divides them; 0: not at all. Default: "
        "of the model, or 128.",
    ),
    Option(
        "estimator",
        "str",
        None,
        "'quest', or a baseline: 'ste', 'ste_absmax', 'lsq'. Default: of the model, or 'quest'.",
    ),
    Option(
        "modules_to_not_convert",
        "list",
        None,
        "Names, suffixes or regular expressions of linear layers that stay as they are, beside the output embedding.",
    ),
    Option(
        "bit_schedule",
        "str",
        None,
        "Widths in order and the share of the steps for each, such as '8:0.25,4:0.25,1:0.5'; the last is the width of "
        "the result. '4/8:0.5' is 4 bits for weights and 8 for activations.",
    ),
    Option(
        "distillation_weight",
        "float",
        0.0,
        "Share of the loss, in [0, 1], that is the divergence from the full-precision model's logits; 0: none.",
    ),
    Option("distillation_temperature", "float", 1.0, "Temperature of both distributions, above 0."),
    Option(
        "step_learning_rate",
        "float",
        None,
        "Learning rate of the learned steps of estimator 'lsq', under the same schedule. Default: a tenth of "
        "learning_rate.",
    ),
    Option(
        "export",
        "str",
        "packed",
        "What save_model and push_to_hub write: 'packed' (at its bits), 'dense' (floats on the grid, for stock code) "
        "or 'master' (floats to train on). Checkpoints are master always.",
    ),
    Option(
        "weight_only",
        "bool",
        False,
        "Accept that a dense export does not quantise activations, so that it computes something else.",
    ),
    Option("weight_decay", "float", 0.1, "Of the matrices of linear layers only: the paper's."),
    Option("adam_beta2", "float", 0.95, "The paper's; the stock Trainer has 0.999."),
    Option("warmup_steps", "float", 0.1, "Steps, or below 1 their share: the paper's."),
    Option("lr_scheduler_type", "str", "cosine", "The paper's shape; it ends at a tenth of the rate, this one at 0."),
)

# Of the command line only: in Python the rows are a dataset of tokens.
QAT_DATA_OPTIONS = (
    Option("text_column", "str", "text", "Column of the dataset that holds the texts."),
    Option("block_size", "int", 512, "Tokens of a row."),
    Option("from_scratch", "bool", False, "Start from random weights of that architecture."),
    Option("sample_prompt", "str", None, "Print a continuation of it at the end, and tokens per second."),
)
