"""The card of a quantisation-aware run, in the place of the one that transformers or TRL would write."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from hfnoise.quantization.hf_card import quantization_card
from hfnoise.quantization.hf_export import quantized_layers
from hfnoise.quantization.report import quantization_report

# How transformers and TRL call the name of the dataset.
_DATASET_NAMES = ("dataset_name", "dataset_tags", "dataset")
_SETTINGS = (
    "bit_schedule", "distillation_weight", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "optim", "adam_beta2", "max_grad_norm", "seed",
)  # fmt: skip


class QATCardMixin:
    """The part of [`~hfnoise.QATTrainerMixin`] that writes `README.md`."""

    args: Any
    model: Any
    state: Any
    dense_difference: dict[str, float] | None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card to `output_dir/README.md`; takes the arguments of the stock Trainer's method.

        `model_name`, the name of the dataset and `tags` are read; the rest comes from the run. Adapters have the stock
        card.
        """
        stock: Any = super().create_model_card  # type: ignore[misc]
        if is_peft_model(self.model):
            stock(*args, **kwargs)
            return
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        given = {**inspect.signature(stock).bind_partial(*args).arguments, **kwargs}
        dataset: Any = next((given[name] for name in _DATASET_NAMES if given.get(name)), [])
        tags = given.get("tags") or []
        folder = Path(self.args.output_dir)
        card = quantization_card(
            self.model,
            next(iter(quantized_layers(self.model).values()))[1],
            quantization_report(self.model),
            self.args.export,
            given.get("model_name") or folder.name,
            self.hub_model_id or self.args.output_dir,  # type: ignore[attr-defined]
            getattr(self.model.config, "_name_or_path", ""),
            [dataset] if isinstance(dataset, str) else dataset,
            [tags] if isinstance(tags, str) else tags,
            self.dense_difference,
            self._training_rows(),
            self._metric_rows(),
        )
        folder.mkdir(parents=True, exist_ok=True)
        card.save(folder / "README.md")

    def _training_rows(self) -> list[tuple[str, str]]:
        args = self.args
        rows = [(name, getattr(args, name)) for name in _SETTINGS]
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        shown = [(name, str(getattr(value, "value", value))) for name, value in rows if value is not None]
        return [*shown, ("steps", str(self.state.global_step)), ("rows per step", str(batch))]

    def _metric_rows(self) -> list[tuple[str, str]]:
        history = self.state.log_history
        last: dict[str, Any] = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
        rows = [("loss (nats per token)", f"{last['eval_loss']:.4f}")] if last else []
        metrics: dict[str, Any] = next((entry for entry in reversed(history) if "qat/error_mean" in entry), {})
        shown = {"qat/error_mean": "mean error of a quantised weight matrix", "qat/trust_fraction": "trusted weights"}
        return rows + [(text, f"{metrics[name]:.1%}") for name, text in shown.items() if name in metrics]
