"""Quantisation-aware training with the Trainer you have: [`QATTrainerMixin`] in front of it, and [`QATTrainer`]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from hfnoise.quantization.weight_cache import cached_weights
from hfnoise.trainers.checkpoints import last_complete_checkpoint
from hfnoise.trainers.evaluated_before import train_in_step
from hfnoise.trainers.ignored_settings import refuse_ignored_settings
from hfnoise.trainers.qat_bits import BitScheduleCallback
from hfnoise.trainers.qat_card import QATCardMixin
from hfnoise.trainers.qat_config import QATArguments
from hfnoise.trainers.qat_distillation import DistillationMixin
from hfnoise.trainers.qat_export import QATExportMixin, refuse_sharded
from hfnoise.trainers.qat_metrics import quantization_metrics
from hfnoise.trainers.qat_model import current_bits, is_quantized, prepare_student, target_config

# Of the rate of the weights: Adam moves an entry by about the rate, and a step of 0.02 by 10 % at 2e-3.
_STEP_RATE = 0.1


class QATTrainerMixin(QATCardMixin, QATExportMixin, DistillationMixin):
    """Put in front of a Trainer, it trains with quantised weights and activations; see [`QATArguments`].

    ```python
    class QATDPOTrainer(QATTrainerMixin, DPOTrainer):
        pass
    ```

    A float model is quantised in place ([`~hfnoise.prepare_qat`]); one that is quantised already stays as it is.
    Without a schedule and without distillation a step is that of the stock Trainer on the prepared model, to the bit.
    Weight decay reaches the matrices of linear layers only: not embeddings, the output head, norms, biases and LSQ's
    steps. With gradient accumulation a weight is quantised once per optimizer step (where inputs are quantised too:
    otherwise its gradient goes through it), and in evaluation once in all; not under FSDP and DeepSpeed. Logs have
    `qat/trust_fraction`, `qat/error_mean`, `qat/error_worst`, `qat/bits_per_weight`, `qat/weight_bits`; the name of
    the worst layer is in `state.log_history`.

    Checkpoints have master weights and the bits of their step; `save_model` and `push_to_hub` write `args.export`.

    Args:
        *args: of the Trainer; its `args` are [`QATTrainingArguments`], or a class with [`QATArguments`] in front.
        teacher_model (`torch.nn.Module` or `str`, *optional*): for `distillation_weight`; by default a frozen copy of
            the float model.
        **kwargs: of the Trainer.

    Raises:
        ValueError: at construction, for arguments that contradict the model or each other.
    """

    _teacher_given: Any = None

    def __init__(self, *args: Any, teacher_model: Any = None, **kwargs: Any) -> None:
        found = [one for one in (*args, *kwargs.values()) if isinstance(one, QATArguments)]
        if not found:
            raise ValueError(
                f"{type(self).__name__} needs args of a class with QATArguments in front, such as "
                "QATTrainingArguments(output_dir=..., bits=1)."
            )
        training = found[0]
        refuse_ignored_settings(training)
        if training.export != "master":
            refuse_sharded(training, f"export={training.export!r}")
        self._teacher_given = teacher_model
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, nn.Module):
            self._teacher = prepare_student(model, training, teacher_model)
        super().__init__(*args, **kwargs)
        if not is_quantized(self.model):  # a name, which the Trainer loaded
            self._teacher = prepare_student(self.model, training, teacher_model)
        self._check_quantized()

    def call_model_init(self, trial: Any = None) -> Any:
        """Return a new model of `model_init`, prepared."""
        model = super().call_model_init(trial)  # type: ignore[misc]
        self._teacher = prepare_student(model, self.args, self._teacher_given)
        return model

    def _check_quantized(self) -> None:
        mro = type(self).__mro__
        # Whose loss is distilled; a mixin that only pushes or writes cards has none.
        after = next(one for one in mro[mro.index(DistillationMixin) + 1 :] if hasattr(one, "compute_loss"))
        if self._teacher is not None:
            self._check_distillation(after)
        self._check_activations()
        if self._estimator() == "lsq" and self.args.world_size > 1:
            raise ValueError(
                "estimator='lsq' sets its steps from the first batch, which differs between processes: each would "
                "train a model of its own. Use one process, or estimator='quest'."
            )
        self._bits: BitScheduleCallback | None = None
        schedule = self.args.schedule_for(target_config(self.model, self.args))
        if schedule is not None:
            if self.args.max_steps > 0:
                schedule.starts(self.args.max_steps)
            self._bits = BitScheduleCallback(self.model, schedule)
            self.callback_handler.callbacks.insert(0, self._bits)  # type: ignore[attr-defined]

    def _check_activations(self) -> None:
        activations = current_bits(self.model)[1]
        if self.args.export == "dense" and activations is not None and not self.args.weight_only:
            raise ValueError(
                f"export='dense' is for stock layers, which do not quantise activations, and here they have "
                f"{activations} bits: the float model would compute something else. Use export='packed', or accept it "
                "by weight_only=True; the card will state the measured difference."
            )
        if self.args.export == "packed" and self._estimator() == "lsq":
            raise ValueError(
                "the model's estimator is 'lsq', which has no packed form; use export='dense' or 'master'."
            )

    def _estimator(self) -> str:
        return next(m.quantization.estimator for m in self.model.modules() if hasattr(m, "quantization"))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; quantised weights are kept between micro-batches where that is possible.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint; `True` is the newest whole one.
            *args, **kwargs: of the Trainer.
        """
        if resume_from_checkpoint is True:
            # The newest folder may be one that a killed process has left half-written.
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if self._bits is not None:
            self._bits.model = self.model
            self._bits.resumed_from = resume_from_checkpoint or None
        train_in_step(self)
        with self._cached(self.args.gradient_accumulation_steps > 1):
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict as the Trainer does; weights are quantised once."""
        with self._cached(True):
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _cached(self, wanted: bool) -> Iterator[None]:
        with cached_weights(self.model) if wanted and not self._is_sharded() else nullcontext():
            yield

    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)  # type: ignore[attr-defined]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the weights of linear layers, but for the output head: what weight decay reaches."""
        kept = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        base = self.accelerator.unwrap_model(model)
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        kept |= {id(parameter) for parameter in (() if head is None else head.parameters())}
        linear = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))}
        return [name for name, one in model.named_parameters() if id(one) in linear and id(one) not in kept]

    def create_optimizer(self, model: Any = None) -> Any:
        """Return the Trainer's optimizer; LSQ's steps are a group of their own, at `step_learning_rate`."""
        if self.optimizer is not None:  # type: ignore[attr-defined]
            return super().create_optimizer(model)  # type: ignore[misc]
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        endings = ("weight_step", "activation_step")
        named = (self.model if model is None else model).named_parameters()
        steps = [one for name, one in named if name.endswith(endings) and one.requires_grad]
        if steps and self._estimator() == "lsq":
            chosen = {id(one) for one in steps}
            for group in optimizer.param_groups:
                group["params"] = [one for one in group["params"] if id(one) not in chosen]
            rate = self.args.step_learning_rate or _STEP_RATE * self.args.learning_rate
            optimizer.add_param_group({"params": steps, "weight_decay": 0.0, "lr": rate})
        return optimizer

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with what quantisation does to the weights beside the loss of training."""
        worst = None
        if "loss" in logs:
            logs |= self._distillation_log()
            if self.is_world_process_zero() and not self._is_sharded():  # type: ignore[attr-defined]
                metrics = quantization_metrics(self.model)
                worst = metrics.worst_layer
                weight_bits, activation_bits = current_bits(self.model)
                logs |= {
                    "qat/trust_fraction": metrics.trust_fraction,
                    "qat/error_mean": metrics.mean_error,
                    "qat/error_worst": metrics.errors[worst],
                    "qat/bits_per_weight": metrics.bits_per_weight,
                    "qat/weight_bits": weight_bits,
                }
                logs |= {} if activation_bits is None else {"qat/activation_bits": activation_bits}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
        if worst is not None:
            # Not in `logs`: trackers plot numbers, and warn of anything else.
            self.state.log_history[-1]["qat/worst_layer"] = worst


class QATTrainer(QATTrainerMixin, Trainer):
    """Quantisation-aware [`~transformers.Trainer`]: QuEST (arXiv 2502.05003), 1 to 8 bits; see [`QATTrainerMixin`].

    ```python
    model = AutoModelForCausalLM.from_pretrained(name)  # floats
    trainer = QATTrainer(model, args=QATTrainingArguments("run", bits=1), train_dataset=rows)
    trainer.train()
    trainer.save_model()  # packed, 1 bit a weight
    ```

    Args:
        *args, **kwargs: of the Trainer; `args` are [`QATTrainingArguments`].
        teacher_model (*optional*): see [`QATTrainerMixin`].

    Example:
        >>> from hfnoise import QATTrainer
        >>> issubclass(QATTrainer, __import__("transformers").Trainer)
        True
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, str):
            raise TypeError(
                f"model is the string {model!r}, and the Trainer of transformers loads no names. Give the model: "
                "AutoModelForCausalLM.from_pretrained(name)."
            )
        super().__init__(*args, **kwargs)
