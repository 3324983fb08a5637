"""The matrix of the Trainers as data: what composes with what, by which check, and what is refused in which words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.combinations.trainer_rows import IMAGES, PREFERENCE, PRIVATE, QUANTIZED, ROWS, Options

# Sums in another order differ in the last bits of float32, and a few steps at these rates multiply that by ten.
ROUNDING = 1e-4
ABSENT = "absent"
OF_SFT = ("DPSFT", "FedSVD", "QATSFT")
PAIRS = (*PREFERENCE, "DPDPO", "DP + RobustDPO", "QAT + DPO", "QAT + RobustDPO")


@dataclass(frozen=True)
class Refused:
    """A cell that is refused.

    Args:
        words: what the error holds.
        by: who raises it, where it is not hfnoise.
        when: `"built"` or, where a package is missed, `"trained"`.
    """

    words: str
    by: str = ""
    when: str = "built"


@dataclass(frozen=True)
class Column:
    """A setting, and what each row does with it.

    Args:
        title: as users write it.
        check: of `trainer_checks.CHECKS`, for the rows that are not in `other`.
        variant, plain: options of the run, and of the one it is compared with.
        other: row -> another check, `Refused`, or `ABSENT` where the row's arguments have no such setting.
        own: row -> (options of the run, options of the compared one).
        tolerance: of the comparison.
    """

    title: str
    check: str
    variant: Options
    plain: Options = Options()
    other: dict[str, Any] = field(default_factory=dict)
    own: dict[str, tuple[Options, Options]] = field(default_factory=dict)
    tolerance: float = ROUNDING


@dataclass(frozen=True)
class Cell:
    """One cell: what is expected of a row with a setting."""

    row: str
    column: str
    expected: Any
    variant: Options
    plain: Options
    tolerance: float


def _rows(names: Any, expected: Any) -> dict[str, Any]:
    return dict.fromkeys(names, expected)


def with_settings(adapter: str | None = None, **settings: Any) -> Options:
    """Return options of training arguments."""
    return Options(settings, adapter)


def _own(names: Any, variant: Options, plain: Options = Options()) -> dict[str, tuple[Options, Options]]:  # noqa: B008
    """Return the same options for several rows, that train an adapter where a row does by itself."""
    return {name: (_adapted(name, variant), _adapted(name, plain)) for name in names}


def _adapted(row: str, options: Options) -> Options:
    """Private Trainers and federations train adapters."""
    if row not in (*PRIVATE, "FedSVD") or options.adapter is not None:
        return options
    return Options(options.settings, "lora", options.base, options.stream, options.more)


def learning(adapter: str | None = None, base: str | None = None, **dp: Any) -> Options:
    """Two passes in order; private: every unit in every step, so that losses are of the same rows."""
    return Options({"max_steps": 6}, adapter, base, more={"dp": {"expected_batch_size": 12, **dp}})


def quantized_base(base: str) -> dict[str, Any]:
    """Return what rows do with a base that bitsandbytes has quantised."""
    return {
        **_rows(PRIVATE, "units"),
        **_rows(QUANTIZED, Refused("was loaded quantised by bitsandbytes")),
        **_rows(IMAGES, Refused("No GPU found", "diffusers, on a CPU")),
    }


def _adam(optimizer: str) -> Options:
    return Options({"optim": optimizer, "learning_rate": 1e-4}, more=FLOAT_INPUTS)


NO_ADAPTER = {
    "OneMoreStep": Refused("an adapter has no config to carry the terminal prior in"),
    "NoisePrompt": Refused("train all of it, without peft_config"),
}
# With quantised inputs a last bit moves an input over a tie, and all that follows: exact is what has float inputs.
FLOAT_INPUTS = {"args": {"bits": None, "weight_bits": 4}}
LOOP = {"grad_mode": "loop"}
SMOOTHED = Options({"label_smoothing_factor": 0.1})
SHARDED = {
    **_rows((*PREFERENCE, "DP + RobustDPO"), Refused("does not run under {}")),
    **_rows(("DPSFT", "DPDPO", "make_private"), Refused("Use DistributedDataParallel")),
    "FedSVD": Refused("FSDP and DeepSpeed shard a model over processes"),
    **_rows(("QAT", "QATSFT", "QAT + DPO"), Refused("export='packed' needs whole weights, and FSDP or DeepSpeed")),
    "QAT + RobustDPO": Refused("needs whole weights, and FSDP or DeepSpeed"),
    **_rows(IMAGES, Refused("DeepSpeed and FSDP hold a model in pieces")),
}


def sharded(engine: str) -> dict[str, Any]:
    """Return the refusals of an engine, by its name."""
    found = {row: Refused(expected.words.format(engine)) for row, expected in SHARDED.items()}
    if engine == "FSDP":  # on several processes by hfnoise
        alone = Refused("Using fsdp only works in distributed training", "transformers, in one process")
        found |= _rows(("DPSFT", "DPDPO", "make_private"), alone)
    return found


COLUMNS: dict[str, Column] = {
    "full": Column(
        "full fine-tuning", "learns", learning(), other={
            "FedSVD": Refused("a federation needs a PEFT model with a LoRA adapter"),
        }, own={row: (learning(**LOOP), Options()) for row in PRIVATE},
    ),
    "lora": Column("LoRA", "learns", learning("lora"), other=NO_ADAPTER),
    "dora": Column("DoRA", "learns", learning("dora"), other=NO_ADAPTER | {
        "FedSVD": Refused("use_dora=True: magnitudes are no part of B A"), **_rows(PRIVATE, "units"),
    }, own={row: (Options(adapter="dora"), Options()) for row in PRIVATE}),
    "nf4": Column("4-bit NF4 base, LoRA", "learns", learning("lora", "nf4"), other=quantized_base("nf4"),
        own={row: (Options(adapter="lora", base="nf4"), Options()) for row in PRIVATE}, tolerance=1e-3),
    "int8": Column("8-bit base, LoRA", "learns", learning("lora", "int8"), other=quantized_base("int8"),
        own={row: (Options(adapter="lora", base="int8"), Options()) for row in PRIVATE}, tolerance=5e-3),
    "adam 8-bit": Column(
        "`optim=\"adamw_bnb_8bit\"`", "same", with_settings(optim="adamw_bnb_8bit", learning_rate=1e-4),
        with_settings(optim="adamw_torch", learning_rate=1e-4), tolerance=5e-3,
        own=_own(QUANTIZED, _adam("adamw_bnb_8bit"), _adam("adamw_torch")),
    ),
    "ddp": Column(
        "two processes (DDP)", "processes", with_settings(per_device_train_batch_size=2),
        other={"FedSVD": Refused("FedSVDTrainer runs the whole federation in one process")},
    ),
    "checkpointing": Column(
        "`activation_checkpointing=True`", "same", with_settings(activation_checkpointing=True),
        other={"NoisePrompt": Refused("the networks of golden noise are small and have none")},
    ),
    "accumulation": Column(
        "gradient accumulation", "same",
        with_settings(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    ),
    "compile": Column(
        "`torch_compile=True`", "same", with_settings(torch_compile=True, torch_compile_backend="aot_eager"),
        own=_own(QUANTIZED, Options({"torch_compile": True, "torch_compile_backend": "aot_eager"}, more=FLOAT_INPUTS),
                 Options(more=FLOAT_INPUTS)),
    ),
    "bf16": Column("`bf16=True`", "close", with_settings(bf16=True), tolerance=0.1,
        other={"NoisePrompt": "same"},  # float32 whatever autocast says
        own=_own(QUANTIZED, Options({"bf16": True}, more=FLOAT_INPUTS), Options(more=FLOAT_INPUTS))),
    "resume": Column(
        "resume", "resumed", with_settings(max_steps=4, save_strategy="steps", save_steps=2),
    ),
    "streaming": Column("streaming dataset", "same", Options(stream=True), other={
        "BVPO": Refused("BVPO counts the rows whose answer would be cut before it trains"),
        **_rows(PRIVATE, Refused("a streaming train_dataset has no length and no random access")),
        "FedSVD": Refused("are streaming datasets"),
    }),
    "average": Column("average of weights (`ema_decay`)", "average", with_settings(ema_decay=0.5),
        other=_rows([row for row in ROWS if row not in IMAGES], ABSENT)),
    "moving reference": Column(
        "`sync_ref_model=True`", "has effect", with_settings(sync_ref_model=True, ref_model_sync_steps=1), other={
            **_rows([row for row in ROWS if row not in PAIRS], ABSENT),
            **_rows(("DPDPO", "DP + RobustDPO"), Refused("sync_ref_model=True` while using a PEFT model", "TRL")),
        },
    ),
    "prefix sharing": Column("`prefix_sharing=True`", "same", with_settings(prefix_sharing=True), other={
        **_rows([row for row in ROWS if row not in (*PREFERENCE, "DP + RobustDPO", "QAT + RobustDPO")], ABSENT),
        "DP + RobustDPO": Refused("prefix_sharing=True puts several units into one row"),
    }, own=_own(["QAT + RobustDPO"], Options({"prefix_sharing": True}, more=FLOAT_INPUTS),
                Options(more=FLOAT_INPUTS))),
    "padding free": Column("`padding_free=True`", "same", with_settings(padding_free=True, max_length=None), other={
        **_rows(PAIRS, Refused("padding_free=True has no effect")),
        "DPSFT": Refused("padding_free=True puts several units into one row"),
        "DPDPO": Refused("padding_free=True puts several units into one row"),
        **_rows([row for row in ROWS if row not in (*PAIRS, *OF_SFT)], ABSENT),
    }),
    "label smoothing": Column("`label_smoothing_factor`", "has effect", SMOOTHED, other={
        **_rows(PAIRS, Refused("has no effect: it smooths the labels of tokens")),
        **_rows(("DPSFT", "make_private"), "units"),
        **_rows(IMAGES, Refused("a denoiser has no labels")),
    }),
    "neftune": Column("`neftune_noise_alpha`", "has effect", with_settings(neftune_noise_alpha=5.0), other={
        **_rows(PRIVATE, Refused("scales its noise by the length of the longest row of the batch")),
        **_rows(IMAGES, Refused("it is noise on token embeddings, and a denoiser has none")),
    }),
    "liger": Column("`use_liger_kernel=True`", "same", with_settings(use_liger_kernel=True), other={
        **_rows([row for row in ROWS if row not in IMAGES], Refused(
            "liger-kernel", "transformers, without liger-kernel; not run with it", "trained")),
        **_rows(IMAGES, Refused("use_liger_kernel=True is for models of transformers")),
    }),
    "fsdp": Column("FSDP", "", Options(more={"set": {"fsdp": True, "fsdp_config": {}}}), other=sharded("FSDP")),
    "deepspeed": Column(
        "DeepSpeed", "", Options(more={"set": {"deepspeed": {"zero_optimization": {"stage": 2}}}}),
        other=sharded("DeepSpeed"),
    ),
}  # fmt: skip


def cells() -> Iterator[Cell]:
    """Return all cells, column by column."""
    for name, column in COLUMNS.items():
        for row in ROWS:
            expected = column.other.get(row, column.check)
            variant, plain = column.own.get(row, (None, None)) if row in column.own else (column.variant, column.plain)
            if name != "full":
                variant, plain = _adapted(row, variant), _adapted(row, plain)
            yield Cell(row, name, expected, variant, plain, column.tolerance)
