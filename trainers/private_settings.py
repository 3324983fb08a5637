"""What makes the steps of a private run: if any of it differs on resume, steps done again are another release."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hfnoise.privacy.hf_fingerprint import dataset_fingerprint

# Arguments that change no step, but for the last bits of float32: where things go, what is shown, how it is computed.
# All others count, those of later versions too: a run too many on the ledger is safe, a step too few is not.
_NO_STEP_STARTS = (
    "logging_", "log_", "eval_", "save_", "hub_", "push_to_hub", "trackio_", "dataloader_", "ddp_", "do_", "fsdp",
    "include_", "torch_compile", "gradient_checkpointing", "activation_",
)  # fmt: skip
_NO_STEP = {
    "output_dir", "run_name", "project", "report_to", "disable_tqdm", "prediction_loss_only", "batch_eval_metrics",
    "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "resume_from_checkpoint", "restore_callback_states_from_checkpoint",
    "enable_jit_checkpoint", "debug", "skip_memory_metrics", "torch_empty_cache_steps", "length_column_name",
    # Refused, taken over, or part of the mechanism, which is compared by itself:
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "average_tokens_across_devices",
    "ignore_data_skip", "auto_find_batch_size", "train_sampling_strategy", "deepspeed", "packing", "padding_free",
    # Where and how fast; what they make of the rows is in the fingerprint of the rows:
    "use_cpu", "local_rank", "accelerator_config", "parallelism_config", "full_determinism", "dataset_num_proc",
    "precompute_ref_batch_size", "trust_remote_code", "model_init_kwargs",
}  # fmt: skip
# With a schedule that follows the evaluation, that makes the steps as well.
_PLATEAU = ("eval_strategy", "eval_steps", "metric_for_best_model", "greater_is_better")
_NO_MODEL = ("_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype")
_NO_ADAPTER = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")


def built_settings(trainer: Any) -> dict[str, Any]:
    """Return what is settled when a private Trainer is built: classes, model, adapter and the prepared rows.

    Args:
        trainer ([`~hfnoise.DPTrainerMixin`]): its weights are not looked at; a resume brings its own.
    """
    config: Any = getattr(trainer.model, "config", None)
    model = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
    adapters = {
        name: {key: value for key, value in adapter.to_dict().items() if key not in _NO_ADAPTER}
        for name, adapter in getattr(trainer.model, "peft_config", {}).items()
    }
    return {
        "trainer": type(trainer).__name__,
        "data_collator": _name(trainer.data_collator),
        "optimizer": _name(trainer.optimizer),
        "model": _hash({key: value for key, value in model.items() if key not in _NO_MODEL}),
        "adapter": _hash(adapters),
        # After tokenising: another chat template or tokenizer makes other gradients of the same dataset.
        "rows": dataset_fingerprint(trainer.train_dataset),
    }


def step_settings(args: Any, dp_config: Any, micro_batch_size: int) -> dict[str, Any]:
    """Return the arguments that make the steps, as JSON gives them back.

    Args:
        args (`TrainingArguments`): of the Trainer.
        dp_config ([`DPConfig`]): of which the mechanism itself is not repeated here.
        micro_batch_size (`int`): decides which units share the draws of dropout.
    """
    values = args.to_dict()
    found = {
        name: value
        for name, value in values.items()
        if name not in _NO_STEP and not name.startswith(_NO_STEP_STARTS) and not name.endswith("_token")
    }
    if values["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy"):
        found |= {name: values[name] for name in _PLATEAU}
    found |= {"micro_batch_size": micro_batch_size, "adam_bias_correction": dp_config.adam_bias_correction}
    plain: dict[str, Any] = _plain(found)
    return plain


def _name(thing: Any) -> str | None:
    if thing is None:
        return None
    return str(getattr(thing, "__qualname__", None) or type(thing).__qualname__)


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(values), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back, the same in every process."""
    value = getattr(value, "value", value)
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
