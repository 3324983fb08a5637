"""The joint with Hugging Face: one step of the Trainer is one Poisson batch, clipped per unit, noised once."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from hfnoise.privacy.gradient_recorder import UnitGradientRecorder
from hfnoise.privacy.hf_fingerprint import dataset_fingerprint
from hfnoise.privacy.sampling import PoissonSampler
from hfnoise.trainers.private_batches import (
    MicroBatch,
    PlannedRows,
    PrivateBatch,
    StepPlans,
    plan_loader,
    unit_of_rows,
)
from hfnoise.trainers.private_card import PrivateCardMixin
from hfnoise.trainers.private_check import check_trainer
from hfnoise.trainers.private_config import DPConfig
from hfnoise.trainers.private_course import PrivateCourseMixin
from hfnoise.trainers.private_dataset import given_train_dataset, is_processed
from hfnoise.trainers.private_metrics import PrivacyLog, PrivateMetricsFilter
from hfnoise.trainers.private_noise import noise_source, refuse_optimizer
from hfnoise.trainers.private_randomness import seeded
from hfnoise.trainers.private_refusals import refuse_trainer
from hfnoise.trainers.private_run import PrivateRun
from hfnoise.trainers.private_scale import LossScale
from hfnoise.trainers.private_step import PrivateStep
from hfnoise.trainers.private_units import Units, unit_names
from hfnoise.trainers.quantized_base import keep_differentiable

logger = logging.getLogger(__name__)


class DPTrainerMixin(PrivateCardMixin, PrivateCourseMixin):
    """Put in front of a Trainer, it makes its training differentially private; see [`DPConfig`] for the settings.

    ```python
    class DPRewardTrainer(DPTrainerMixin, RewardTrainer):
        pass
    ```

    One step of the Trainer is one logical batch: every unit is in it with probability `expected_batch_size / units`,
    independently (Poisson sampling). The batch is cut into micro-batches, each goes through the Trainer's own
    `training_step`, the gradients of its units are clipped and added, and after the last one the noise is added, once,
    and the sum is divided by the constant expected batch size. Any optimizer, schedule or averaging of weights
    afterwards costs no privacy.

    Formal guarantee: the weights after T steps are (epsilon, delta)-differentially private with respect to adding or
    removing one unit, with the epsilon of [`~hfnoise.privacy.accounting.compute_epsilon`], if the loss is a sum over
    units (checked before the first step), what a forward pass draws at random (dropout) is fresh for each unit and
    unknown, and the secret stays secret. Not covered: the metrics of evaluation data, the choice of hyperparameters
    (see `dp_tune`), the number of units, and the pretrained weights. `epsilon()`, `target_delta`, `noise_multiplier`,
    `sample_rate` and `privacy_report()` say what it is.

    Args:
        *args: of the Trainer.
        dp_config ([`DPConfig`]): the privacy settings; required.
        **kwargs: of the Trainer.

    Raises:
        ValueError: at construction, for settings under which the guarantee would not hold.
    """

    dp_config: DPConfig
    optimizer: Any
    _remove_unused_columns: Any
    _get_collator_with_removed_columns: Any
    _is_private = False

    def __init__(self, *args: Any, dp_config: DPConfig | None = None, **kwargs: Any) -> None:
        if dp_config is None:
            raise ValueError(
                f"{type(self).__name__} needs dp_config: for example dp_config=DPConfig(target_epsilon=3) to "
                "calibrate the noise, or DPConfig(noise_multiplier=1.0)."
            )
        super().__init__(*args, **kwargs)
        mro = type(self).__mro__
        after = mro[mro.index(DPTrainerMixin) + 1 :]
        self._make_private(dp_config, given_train_dataset(after, args, kwargs))

    def _make_private(self, config: DPConfig, given_dataset: Any = None) -> None:
        """Turn a built Trainer into a private one, or raise ValueError; the last act of construction.

        Args:
            config ([`DPConfig`]): the privacy settings.
            given_dataset: the dataset before the Trainer tokenised it, whose content names it in the ledger; the rows
                of the Trainer name it if this is None.
        """
        if not isinstance(config, DPConfig):
            raise ValueError(f"dp_config must be a DPConfig, got {type(config).__name__}.")
        in_float32(self.model)
        keep_differentiable(self.model)
        refuse_trainer(self, config)
        refuse_optimizer(self.args, self.optimizer, config)
        self.dp_config = config
        dataset = self.train_dataset
        self._units = self._find_units(dataset, given_dataset)
        args = self.args = copy.copy(self.args)  # the caller's stay as they are
        accumulation = args.gradient_accumulation_steps
        batch = args.per_device_train_batch_size * accumulation * args.world_size
        self.expected_batch_size = config.expected_batch_size or batch
        self._micro_batch_size = config.micro_batch_size or args.per_device_train_batch_size
        if config.grad_mode == "loop":
            self._micro_batch_size = 1
        if self.expected_batch_size > self._units.count:
            raise ValueError(
                f"expected_batch_size={self.expected_batch_size} is more than the {self._units.count} units, so the "
                "sample rate would exceed 1. Use a smaller batch."
            )
        if given_dataset is None and is_processed(self) and config.unsafe_seed is None:
            logger.warning(
                "the ledger knows this dataset by the rows after tokenising. The same data given to %s as it was "
                "before, or tokenised in another way, is another dataset for it, with a budget of its own. Give the "
                "dataset itself: make_private(trainer, dp_config, dataset=...).", "DPSFTTrainer or DPDPOTrainer",
            )  # fmt: skip
        self.fingerprint = dataset_fingerprint(dataset if given_dataset is None else given_dataset)
        self._take_over_arguments()
        if config.grad_mode == "loop" and config.max_rows_per_unit > 1 and args.world_size > 1:
            raise ValueError(
                "grad_mode='loop' with max_rows_per_unit above 1 gives processes batches of different sizes, on which "
                "gathering losses would hang. Use grad_mode='leaf', or one process."
            )
        if config.grad_mode == "leaf":
            UnitGradientRecorder(self.model, 1).close()  # names trainable parameters that are not covered, now
        self._privacy_log = PrivacyLog(self)
        self.callback_handler.callbacks[:0] = [PrivateMetricsFilter(config.log_private_metrics), self._privacy_log]
        self._begin_course()
        self._is_private = True

    def _take_over_arguments(self) -> None:
        """Set what a private step does itself: accumulation, clipping, the scale of the loss."""
        args = self.args
        if args.max_grad_norm:
            logger.info("max_grad_norm set from %s to 0: gradients are clipped per unit instead.", args.max_grad_norm)
        args.max_grad_norm = 0.0
        args.gradient_accumulation_steps = self.accelerator.gradient_accumulation_steps = 1
        args.average_tokens_across_devices = False
        # Batches that are done are skipped, not drawn again: a repeated mask would be a release that nobody counted.
        args.ignore_data_skip = False

    def _find_units(self, dataset: Any, given: Any) -> Units:
        """Return the protected units of the dataset."""
        column = self.dp_config.unit_column
        if column is None:
            return Units(len(dataset))
        # The Trainer may have dropped the column in tokenising, and kept the rows.
        for source in (dataset, given):
            if source is not None and column in (getattr(source, "column_names", None) or ()):
                if len(source) == len(dataset):
                    return Units(len(dataset), unit_names(source, column), self.dp_config.max_rows_per_unit)
        raise ValueError(
            f"unit_column={column!r} is not a column of train_dataset (columns: "
            f"{getattr(given if given is not None else dataset, 'column_names', None)}), or rows were dropped in "
            "tokenising, so that nobody knows whose the others are. Name a column, or filter the rows yourself first."
        )

    @property
    def sample_rate(self) -> float:
        """Probability that a unit is in the batch of a step."""
        return self.expected_batch_size / self._units.count

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every unit is expected once."""
        return math.ceil(self._units.count / self.expected_batch_size)

    def planned_steps(self) -> int:
        """Return how many steps `train()` is to take."""
        args = self.args
        return int(args.max_steps) if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.steps_per_epoch)

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of Poisson batches; see [`StepPlans`]."""
        if not self._is_private:
            return super().get_train_dataloader()  # type: ignore[misc]
        run = self.private_run
        plans = StepPlans(
            PoissonSampler(self._units.count, self.sample_rate, run.state.bands),
            self._units,
            run.random,
            micro_batch_size=self._micro_batch_size,
            steps_per_epoch=self.steps_per_epoch,
            current_step=lambda: self.state.global_step,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        return plan_loader(self.planned_rows(), plans, self.args)

    def planned_rows(self) -> PlannedRows:
        """Return the training rows as the model takes them: unused columns removed, collated."""
        dataset, collate = self.train_dataset, self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        return PlannedRows(dataset, collate, padded=self.dp_config.grad_mode == "leaf")

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run one private step; `inputs` is the [`PrivateBatch`] of this process.

        Returns:
            The loss, for the log: zero unless `log_private_metrics`, since it is no noisy quantity.
        """
        if not isinstance(inputs, PrivateBatch):
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        step = self.state.global_step
        if inputs.step != step:
            raise RuntimeError(
                f"the batch of step {inputs.step} arrived at step {step}: its noise would belong to another batch, "
                "and epsilon would be false."
            )
        if self._step is None:
            self._prepare_private_steps(model)
        run = self.private_run
        self._step.begin()
        total = torch.zeros((), device=self.args.device)
        # Gradients are summed below, not by the reducer of DistributedDataParallel.
        with self.accelerator.no_sync(model):
            for micro_batch in inputs:
                total += self._add_micro_batch(model, micro_batch)
        run.charge(step + 1)  # on the disk before the weights know of it
        self._step.finish(step)
        return total / len(inputs) if self.dp_config.log_private_metrics else torch.zeros_like(total)

    def _add_micro_batch(self, model: Any, micro_batch: MicroBatch) -> Tensor:
        """Add the clipped gradients of the units of one micro-batch; return its mean loss."""
        with seeded(micro_batch.seed, self.args.device.type):
            if self._recorder is None:
                gradients, loss = self._gradients_by_loop(model, micro_batch)
            else:
                gradients, loss = self._gradients_by_leaves(model, micro_batch)
        self._step.add(gradients)
        if self._recorder is not None:
            self._recorder.reset()
        return loss

    def _gradients_by_leaves(self, model: Any, micro_batch: MicroBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the gradients of all units of a micro-batch, from one backward pass, and the mean loss."""
        recorder, scale, device, inputs = self._recorder, self._loss_scale, self.args.device, micro_batch.inputs
        weights = scale.row_weights(inputs, micro_batch.counts, self._units.max_rows)
        unit = unit_of_rows(self._micro_batch_size, self._units.max_rows, scale.copies, device)
        with recorder.record(unit, weights.repeat(scale.copies).to(device)):
            loss = super().training_step(model, inputs, scale.num_items_in_batch)  # type: ignore[misc]
        gradients = recorder.collect()
        return gradients, self._mean_loss(loss, inputs)

    def _gradients_by_loop(self, model: Any, micro_batch: MicroBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the gradient of the one unit of a micro-batch from an ordinary backward pass, and its loss."""
        model.zero_grad()
        loss = super().training_step(model, micro_batch.inputs, None)  # type: ignore[misc]
        counts = bool(micro_batch.counts.any())
        gradients = {
            name: (torch.zeros_like(value) if value.grad is None or not counts else value.grad.detach().clone())[None]
            for name, value in self._private_parameters.items()
        }
        model.zero_grad()
        return gradients, loss.detach()

    def _mean_loss(self, loss: Tensor, inputs: Any) -> Tensor:
        if self._loss_scale.reduction != "sum":
            return loss.detach()
        from hfnoise.trainers.private_scale import row_tokens

        return loss.detach() / row_tokens(inputs, self._loss_scale.shifts_labels).sum().clamp(min=1)

    def _prepare_private_steps(self, model: Any) -> None:
        """Check that the loss is a sum over units, then set up per-unit gradients, clipping and noise."""
        config = self.dp_config
        self._private_parameters = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        self._loss_scale: LossScale = check_trainer(self, model).scale
        if config.grad_mode == "leaf":
            self._recorder = UnitGradientRecorder(self.model, self._micro_batch_size)
            self._private_parameters = self._recorder.parameters
        run: PrivateRun = self.private_run
        self._step = PrivateStep(
            self._private_parameters,
            clip_norm=config.clip_norm,
            clipping=config.clipping,
            expected_batch_size=self.expected_batch_size,
            noise=noise_source(run, sum(value.numel() for value in self._private_parameters.values())),
            noise_multiplier=run.state.noise_multiplier,
            accumulation_dtype=config.accumulation_dtype,
            device=self.args.device,
        )
        self._before = {name: value.detach().to("cpu", copy=True) for name, value in self._private_parameters.items()}


def in_float32(model: Any) -> None:
    """Put adapters that TRL has cast to bfloat16 (it does so on quantised bases) back into float32.

    Raises:
        ValueError: for other trainable parameters that are not float32.
    """
    low = {
        name: value for name, value in model.named_parameters() if value.requires_grad and value.dtype != torch.float32
    }
    if low and not is_peft_model(model):
        raise ValueError(
            f"{len(low)} trainable parameters are not float32 ({next(iter(low))} is "
            f"{next(iter(low.values())).dtype}): noise that is rounded to 16 bits takes a few thousand values only, "
            "and no proof covers that. Load the model with dtype='float32'; bf16=True computes in bfloat16 anyway."
        )
    for value in low.values():
        value.data = value.data.float()
    if low:
        logger.info("%d adapter weights put into float32: noise and averages are not to be rounded.", len(low))
