"""The rows of the matrix: every Trainer, built on a tiny real model with the options of a column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig

from hfnoise import (
    BVPOConfig,
    BVPOTrainer,
    DPConfig,
    DPDPOTrainer,
    DPSFTTrainer,
    DPTrainerMixin,
    DrDPOConfig,
    DrDPOTrainer,
    FedSVDConfig,
    FedSVDTrainer,
    NoiseDPOConfig,
    NoiseDPOTrainer,
    QATArguments,
    QATSFTConfig,
    QATSFTTrainer,
    QATTrainer,
    QATTrainerMixin,
    QATTrainingArguments,
    QuestConfig,
    RobustDPOConfig,
    RobustDPOTrainer,
    make_private,
)
from tests.conftest import WORDS
from tests.trainers.diffusion_world import DiffusionTrainer, DiffusionTrainingArguments, make_rows, new_scheduler
from tests.trainers.one_more_step_world import OneMoreStepTrainer, OneMoreStepTrainingArguments

# SGD: a difference of gradients stays as small in the weights; Adam divides it by its own size.
ARGUMENTS = {
    "use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "disable_tqdm": True,
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 3, "learning_rate": 0.05,
    "lr_scheduler_type": "constant", "optim": "sgd", "weight_decay": 0.0, "warmup_steps": 0, "logging_steps": 1,
    "save_strategy": "no", "seed": 3, "train_sampling_strategy": "sequential",
}  # fmt: skip
ROWS_OF_DATA = 12  # three steps of four: one pass
LAYERS = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Options:
    """What a cell asks for.

    Args:
        settings: training arguments.
        adapter: `"lora"`, `"dora"` or `"ia3"`; `None` trains what the row trains by itself.
        base: `"nf4"` or `"int8"`, loaded by bitsandbytes; `None` is float32.
        stream: whether the dataset is a streaming one.
        more: of the row's own (a DPConfig's settings, a share of a loss, ...), by name of the part.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    base: str | None = None
    stream: bool = False
    more: dict[str, Any] = field(default_factory=dict)


def adapter_config(kind: str | None, layers: list[str] | str = LAYERS, **settings: Any) -> Any:
    """Return the PEFT configuration of that name."""
    if kind is None:
        return None
    return LoraConfig(r=2, lora_alpha=4, target_modules=layers, use_dora=kind == "dora", **settings)


def base_config(kind: str | None, family: Any = BitsAndBytesConfig) -> Any:
    """Return the quantisation of that name."""
    return None if kind is None else family(load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8", **_nf4(kind))


def _nf4(kind: str) -> dict[str, Any]:
    return {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} if kind == "nf4" else {}


def language_model(path: str, options: Options, quantization: Any = None) -> Any:
    """Return the tiny Llama: float32, or on a quantised base."""
    config = base_config(options.base) or quantization
    more = {} if config is None else {"quantization_config": config}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **more)


def _words(generator: torch.Generator, count: int) -> str:
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())


def pairs(options: Options) -> Any:
    """Return preference pairs, some with the same prompt length and some not."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt": _words(generator, 3 + number % 4),
            "chosen": f" {_words(generator, 2 + number % 3)} fox",
            "rejected": f" {_words(generator, 2 + number % 5)} dog",
        }
        for number in range(ROWS_OF_DATA)
    ]
    return _given(rows, options)


def trace_pairs(options: Options) -> Any:
    """Return pairs with traces and without."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt": _words(generator, 3 + number % 3) + " ",
            "chosen": f"<think>\n{_words(generator, 3 + number % 3)}\n</think>\n\n fox",
            "rejected": f"<think>\n{_words(generator, 2 + number % 4)}\n</think>\n\n dog",
            "chosen_nothink": f"{_words(generator, 1)} fox",
            "rejected_nothink": f"{_words(generator, 1)} dog",
        }
        for number in range(ROWS_OF_DATA)
    ]
    return _given(rows, options)


def texts(options: Options, count: int = ROWS_OF_DATA, **columns: Any) -> Any:
    """Return short texts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"text": _words(generator, 4 + number % 5)} for number in range(count)]
    return _given([row | {name: of[n] for name, of in columns.items()} for n, row in enumerate(rows)], options)


def token_rows(options: Options) -> Any:
    """Return rows of tokens of one length, as a plain Trainer takes them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (ROWS_OF_DATA, 10), generator=generator).tolist()
    return _given([{"input_ids": row, "labels": row} for row in ids], options)


def _given(rows: list[dict[str, Any]], options: Options) -> Any:
    dataset = Dataset.from_list(rows)
    return dataset.to_iterable_dataset() if options.stream else dataset


def _arguments(arguments_class: Any, folder: Path, options: Options, **own: Any) -> Any:
    return arguments_class(**{**ARGUMENTS, "output_dir": str(folder), **own, **options.settings})


def _tokenizer(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)


def _preference(trainer_class: Any, config_class: Any, data: Callable[[Options], Any] = pairs, **own: Any) -> Any:
    """Return the builder of a Trainer of pairs."""

    def build(path: str, folder: Path, options: Options) -> Any:
        args = _arguments(
            config_class, folder, options, **{"max_length": 32, "beta": 0.5} | own | _of(options, "args")
        )
        more = {"dp_config": _privacy(options)} if issubclass(trainer_class, DPTrainerMixin) else {}
        return trainer_class(
            language_model(path, options), args=args, train_dataset=data(options), processing_class=_tokenizer(path),
            peft_config=adapter_config(options.adapter), **more,
        )  # fmt: skip

    return build


def _of(options: Options, part: str) -> dict[str, Any]:
    return dict(options.more.get(part, {}))


def _privacy(options: Options) -> DPConfig:
    # Little noise, so that it can be seen to learn, and a known one, so that two runs can be compared.
    return DPConfig(
        **{"noise_multiplier": 0.01, "unsafe_seed": 5, "accumulation_dtype": "float64"} | _of(options, "dp")
    )


def _private_sft(path: str, folder: Path, options: Options) -> Any:
    return DPSFTTrainer(
        language_model(path, options), args=_arguments(SFTConfig, folder, options, max_length=32, learning_rate=0.5),
        train_dataset=texts(options), processing_class=_tokenizer(path), peft_config=adapter_config(options.adapter),
        dp_config=_privacy(options),
    )  # fmt: skip


def _made_private(path: str, folder: Path, options: Options) -> Any:
    model = language_model(path, options)
    if options.adapter is not None:
        model = get_peft_model(model, adapter_config(options.adapter))
    args = _arguments(TrainingArguments, folder, options, learning_rate=0.5)
    trainer = Trainer(model, args, train_dataset=token_rows(options))
    return make_private(trainer, _privacy(options))


def _federated(path: str, folder: Path, options: Options) -> Any:
    owners = ["alice", "bob"] * (ROWS_OF_DATA // 2)
    return FedSVDTrainer(
        language_model(path, options), args=_arguments(SFTConfig, folder, options, max_length=32, learning_rate=0.5),
        fedsvd_config=FedSVDConfig(**{"rounds": 2, "local_steps": 2} | _of(options, "federation")),
        train_dataset=texts(options, owner=owners) if not options.stream else dict.fromkeys(
            ("alice", "bob"), texts(options)
        ),
        client_column=None if options.stream else "owner", eval_dataset=texts(Options()),
        processing_class=_tokenizer(path), peft_config=adapter_config(options.adapter),
    )  # fmt: skip


def _quantized(options: Options) -> Any:
    """Return what adapters are put on: layers that are quantised already."""
    return QuestConfig(bits=4) if options.adapter and options.base is None else None


def _qat(path: str, folder: Path, options: Options) -> Any:
    model = language_model(path, options, _quantized(options))
    if options.adapter is not None:
        model = get_peft_model(model, adapter_config(options.adapter))
    args = _arguments(QATTrainingArguments, folder, options, **_bits(options), learning_rate=0.1)
    return QATTrainer(model, args=args, train_dataset=token_rows(options))


def _bits(options: Options) -> dict[str, Any]:
    return ({} if options.adapter else {"bits": 4}) | {"max_grad_norm": 0.0} | _of(options, "args")


def _qat_sft(path: str, folder: Path, options: Options) -> Any:
    args = _arguments(QATSFTConfig, folder, options, **_bits(options), max_length=32, learning_rate=0.1)
    return QATSFTTrainer(
        language_model(path, options, _quantized(options)), args=args, train_dataset=texts(options),
        processing_class=_tokenizer(path), peft_config=adapter_config(options.adapter),
    )  # fmt: skip


@dataclass
class QATDPOConfig(QATArguments, DPOConfig):
    """Arguments of a quantisation-aware `DPOTrainer`, as a user writes them."""


class QATDPOTrainer(QATTrainerMixin, DPOTrainer):
    """Quantisation-aware `DPOTrainer`, as a user writes it."""


@dataclass
class QATRobustDPOConfig(QATArguments, RobustDPOConfig):
    """Arguments of a quantisation-aware `RobustDPOTrainer`."""


class QATRobustDPOTrainer(QATTrainerMixin, RobustDPOTrainer):
    """Quantisation-aware `RobustDPOTrainer`."""


class PrivateRobustDPOTrainer(DPTrainerMixin, RobustDPOTrainer):
    """Differentially private `RobustDPOTrainer`, as a user writes it."""


def _qat_preference(trainer_class: Any, config_class: Any) -> Any:
    def build(path: str, folder: Path, options: Options) -> Any:
        own = {"max_length": 32, "beta": 0.5, **_bits(options), "learning_rate": 0.1}
        return trainer_class(
            language_model(path, options, _quantized(options)), args=_arguments(config_class, folder, options, **own),
            train_dataset=pairs(options), processing_class=_tokenizer(path),
            peft_config=adapter_config(options.adapter),
        )  # fmt: skip

    return build


def _stored(model: Any, folder: Path, options: Options) -> Any:
    """Return the denoiser itself, or loaded from a folder on a quantised base."""
    if options.base is None:
        return model
    import diffusers

    config = base_config(options.base, diffusers.BitsAndBytesConfig)
    model.save_pretrained(folder / "float")
    return type(model).from_pretrained(folder / "float", quantization_config=config)


def _image_arguments(arguments_class: Any, folder: Path, options: Options, **own: Any) -> Any:
    return _arguments(arguments_class, folder, options, **own | _of(options, "args"))


def _diffusion(path: str, folder: Path, options: Options) -> Any:
    from tests.trainers.diffusion_world import new_unet

    rows = make_rows(ROWS_OF_DATA)
    return DiffusionTrainer(
        _stored(new_unet(), folder, options), _image_arguments(DiffusionTrainingArguments, folder, options),
        scheduler=new_scheduler(), train_dataset=rows.to_iterable_dataset() if options.stream else rows,
        peft_config=adapter_config(options.adapter, ["to_q", "to_v"]),
    )  # fmt: skip


def _one_more_step(path: str, folder: Path, options: Options) -> Any:
    from tests.trainers.one_more_step_world import new_module

    rows = make_rows(ROWS_OF_DATA)
    own = {"prompt_dropout": 0.0, "ema_decay": None, "learning_rate": 0.05}
    return OneMoreStepTrainer(
        _stored(new_module(), folder, options), _image_arguments(OneMoreStepTrainingArguments, folder, options, **own),
        train_dataset=rows.to_iterable_dataset() if options.stream else rows,
        **({"peft_config": adapter_config(options.adapter, ["to_q"])} if options.adapter else {}),
    )  # fmt: skip


def _noise_prompt(path: str, folder: Path, options: Options) -> Any:
    from hfnoise.trainers.noise_prompt import NoisePromptTrainer
    from hfnoise.trainers.noise_prompt_arguments import NoisePromptTrainingArguments
    from tests.trainers.noise_prompt_world import make_rows, new_net

    rows = make_rows(ROWS_OF_DATA)
    given = rows
    if options.stream:
        given = Dataset.from_list([{name: one.tolist() for name, one in row.items()} for row in rows])
        given = given.with_format("torch").to_iterable_dataset()
    return NoisePromptTrainer(
        _stored(new_net(), folder, options),
        _image_arguments(NoisePromptTrainingArguments, folder, options, learning_rate=0.5), train_dataset=given,
        **({"peft_config": adapter_config(options.adapter, ["to_q"])} if options.adapter else {}),
    )  # fmt: skip


# Name of the row -> builder of its Trainer.
ROWS: dict[str, Callable[[str, Path, Options], Any]] = {
    "NoiseDPO": _preference(NoiseDPOTrainer, NoiseDPOConfig, loss_type="sym"),
    "RobustDPO": _preference(RobustDPOTrainer, RobustDPOConfig, flip_rate=0.2),
    "DrDPO": _preference(DrDPOTrainer, DrDPOConfig),
    "BVPO": _preference(BVPOTrainer, BVPOConfig, trace_pairs, trace_alpha=0.5, max_length=64),
    "DPSFT": _private_sft,
    "DPDPO": _preference(DPDPOTrainer, DPOConfig, learning_rate=0.5),
    "make_private": _made_private,
    "DP + RobustDPO": _preference(PrivateRobustDPOTrainer, RobustDPOConfig, flip_rate=0.2, learning_rate=0.5),
    "FedSVD": _federated,
    "QAT": _qat,
    "QATSFT": _qat_sft,
    "QAT + DPO": _qat_preference(QATDPOTrainer, QATDPOConfig),
    "QAT + RobustDPO": _qat_preference(QATRobustDPOTrainer, QATRobustDPOConfig),
    "Diffusion": _diffusion,
    "OneMoreStep": _one_more_step,
    "NoisePrompt": _noise_prompt,
}
PRIVATE = ("DPSFT", "DPDPO", "make_private", "DP + RobustDPO")
PREFERENCE = ("NoiseDPO", "RobustDPO", "DrDPO", "BVPO")
QUANTIZED = ("QAT", "QATSFT", "QAT + DPO", "QAT + RobustDPO")
IMAGES = ("Diffusion", "OneMoreStep", "NoisePrompt")
