"""The run side of NoiseDPOTrainer: refusals at construction, resume, skipped steps, the model card."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset

from hfnoise.folders import check_writable
from hfnoise.trainers.checkpoints import check_checkpoint, last_complete_checkpoint
from hfnoise.trainers.run_card import RunCardMixin

logger = logging.getLogger(__name__)

# Options that make another loss of a loss of the same name.
_LOSS_OPTIONS = (
    "beta", "flip_rate", "flip_rate_column", "sample_weight_column", "holder_gamma", "sym_temperature", "ropo_alpha",
    "robust_rescale", "robust_margin_limit", "ld_alpha", "f_divergence_type", "use_weighting",
)  # fmt: skip


class NoiseDPORunMixin(RunCardMixin):
    """Overrides of `trl.DPOTrainer` that concern the course of a run.

    Set `injected_flip_rate` where labels were flipped on purpose, for the card to say so.
    """

    injected_flip_rate: float | None = None

    args: Any
    model: Any
    accelerator: Any
    _config_class: Any
    _monitor: Any

    @classmethod
    def default_config(cls, model: Any) -> Any:
        """Return the configuration used when none is given, named after the model, as TRL does."""
        name = model if isinstance(model, str) else model.config._name_or_path
        return cls._config_class(f"{Path(name).name or 'model'}-{cls._name}")  # type: ignore[attr-defined]

    def refuse_before_loading(self, args: Any, trainer_arguments: dict[str, Any]) -> None:
        """Raise ValueError for whatever is wrong before a model is loaded."""
        if not isinstance(args, self._config_class):
            raise ValueError(
                f"{type(self).__name__} needs args of type {self._config_class.__name__}, got {type(args).__name__}: "
                f"replace {type(args).__name__}(...) by {self._config_class.__name__}(...); it takes the same fields."
            )
        engines = {
            "FSDP": bool(args.fsdp) or _is_on("ACCELERATE_USE_FSDP"),
            "DeepSpeed": bool(args.deepspeed) or _is_on("ACCELERATE_USE_DEEPSPEED"),
            "tensor, context or sequence parallelism": args.parallelism_config is not None,
        }
        for engine, requested in engines.items():
            if requested:
                raise ValueError(_engine_refusal(type(self).__name__, engine))
        check_writable(args.output_dir)
        self.check_datasets(args, trainer_arguments.get("train_dataset"), trainer_arguments.get("eval_dataset"))  # type: ignore[attr-defined]

    def refuse_engines(self) -> None:
        """Raise ValueError if an engine that was never verified is active after all, set outside the arguments."""
        for engine, active in {"FSDP": self.is_fsdp_enabled, "DeepSpeed": self.is_deepspeed_enabled}.items():  # type: ignore[attr-defined]
            if active:
                raise ValueError(_engine_refusal(type(self).__name__, engine))

    def run_identity(self) -> dict[str, Any]:
        """Return what must agree between a checkpoint and the run that resumes from it."""
        args = self.args
        return {
            "trainer": type(self).__name__,
            "loss_type": list(args.loss_type),
            "loss_weights": args.loss_weights and [float(weight) for weight in args.loss_weights],
            **{name: getattr(args, name) for name in _LOSS_OPTIONS},
        }

    def restore_run_state(self, states: dict[str, Any]) -> None:
        """Take over what a subclass has written into a checkpoint; here nothing."""

    def report(self) -> dict[str, Any]:
        """Return what is known of the noise, for the card; a subclass puts its own rows under `settings`."""
        return {"flip_rate": self.args.flip_rate}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `DPOTrainer` does; `resume_from_checkpoint=True` takes the newest checkpoint that is whole.

        Raises:
            ValueError: if the checkpoint is damaged or belongs to another run or model.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            states = check_checkpoint(str(resume_from_checkpoint), self.run_identity(), self.model)
            self.restore_run_state(states)
            if isinstance(self.train_dataset, IterableDataset):  # type: ignore[attr-defined]
                logger.warning(
                    "resuming on a streaming dataset is exact only within the first pass over it: the Trainer does "
                    "not know how long a pass is and skips the pairs of all earlier steps in one."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one micro-batch; once log-probabilities are not finite, nothing of the step reaches the optimizer."""
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self._monitor.skip_step:
            # Gradients set to None, not to 0: an optimizer leaves such parameters and their moments alone.
            model.zero_grad(set_to_none=True)
            loss = torch.zeros_like(loss)
            if self.accelerator.sync_gradients:
                self._monitor.skip_step = False
        return loss

    def run_card(self, **given: Any) -> Any:
        """Return the card of the run: what the noise was and what was done about it."""
        from hfnoise.preference.hf_card import preference_card

        return preference_card(self, **given)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _engine_refusal(trainer: str, engine: str) -> str:
    return (
        f"{trainer} does not run under {engine}: it was never verified that the loss equals that of one process. "
        "Use DistributedDataParallel (`accelerate launch --multi_gpu`), with PEFT or a 4-bit base for large models; "
        "trl.DPOTrainer with loss_type='robust' runs under FSDP and DeepSpeed."
    )
