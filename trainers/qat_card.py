"""The card of a quantisation-aware run, in the place of the one that transformers, PEFT or TRL would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from hfnoise.cards import CardArguments, Metric, last_metrics, number, run_seeds, setting_rows, trained_base
from hfnoise.quantization.hf_card import quantization_card
from hfnoise.quantization.hf_export import quantized_layers
from hfnoise.quantization.report import quantization_report
from hfnoise.trainers.run_card import RunCardMixin

_SETTINGS = (
    "bit_schedule", "distillation_weight", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "optim", "adam_beta2", "max_grad_norm",
)  # fmt: skip
_SHARES = {"qat/error_mean": "mean error of a quantised weight matrix", "qat/trust_fraction": "trusted weights"}


class QATCardMixin(RunCardMixin):
    """The part of [`~hfnoise.QATTrainerMixin`] that writes `README.md`."""

    model: Any
    state: Any
    dense_difference: dict[str, float] | None
    _in_checkpoint: bool

    def run_card(self, **given: Any) -> Any:
        """Return the card: bits in all, what was left out, how it is loaded; of LoRA weights those of the base."""
        user = CardArguments(**given)
        adapter = is_peft_model(self.model)
        # A checkpoint goes on from the master weights.
        form = "adapter" if adapter else "master" if self._in_checkpoint else self.args.export
        return quantization_card(
            self.model.get_base_model() if adapter else self.model,
            next(iter(quantized_layers(self.model).values()))[1],
            quantization_report(self.model),
            form,
            user.model_name or Path(self.args.output_dir).name,
            self.hub_model_id or self.args.output_dir,
            trained_base(self.model, user.finetuned_from),
            run_seeds(self.args),
            user,
            self.dense_difference,
            self._training_rows(),
            self._card_metrics(),
            {"seed": self.args.seed},
        )

    def _training_rows(self) -> list[tuple[str, str]]:
        args = self.args
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = ("steps", str(self.state.global_step))
        return [
            *setting_rows(args, _SETTINGS),
            steps,
            ("rows per step", str(batch)),
            ("processes", str(args.world_size)),
        ]

    def _card_metrics(self) -> list[Metric]:
        loss = last_metrics(self.state.log_history).get("loss")
        found = [] if loss is None else [Metric("loss (nats per token)", number(loss))]
        logs: dict[str, Any] = next((one for one in reversed(self.state.log_history) if "qat/error_mean" in one), {})
        spread = "none: counted over all quantised weights"
        return found + [Metric(text, f"{logs[name]:.1%}", spread) for name, text in _SHARES.items() if name in logs]
