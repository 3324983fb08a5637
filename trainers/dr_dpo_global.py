"""Dr. DPO over the global batch: two ways to weigh pairs by a sum that is known only when the batch is over."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hfnoise.preference.batch_log_sum import BatchLogSum


class DeferredNormalization:
    """Sums unnormalised gradients, then divides them by the sum of the weights: exact, with no extra forward.

    The gradient of Dr. DPO over all pairs of an optimizer step is sum_i w_i grad l_i with w = softmax(-l / dr_beta).
    Each micro-batch back-propagates exp(-l_i / dr_beta - offset) l_i; when the last one is done, every gradient is
    multiplied by one number. Processes share the offset from the last micro-batch of a step on, before
    DistributedDataParallel adds their gradients.
    """

    def __init__(self, trainer: Any, dr_beta: float, loss_weight: float) -> None:
        self.trainer = trainer
        self.dr_beta = dr_beta
        self.loss_weight = loss_weight
        self._sum = BatchLogSum()

    def start_step(self, micro_batches: list[Any], device: torch.device) -> None:
        """Begin a step; whatever a step that was broken off left behind is forgotten."""
        self._sum = BatchLogSum()

    def loss(self, losses: Tensor, base_weights: Tensor | None) -> Tensor:
        """Return what a micro-batch back-propagates, given the loss and the weight of its pairs."""
        exponents = exponents_of(losses, base_weights, self.dr_beta)
        factor = self._sum.add(exponents, base_weights, self._offset_of_all(exponents))
        if factor != 1.0:
            scale_gradients(self.trainer.model, factor)
        known = self._sum.offset > -math.inf  # not before the first pair of a weight above 0
        weights = torch.exp(exponents - self._sum.offset) if known else torch.zeros_like(exponents)
        if base_weights is not None:
            weights = weights * base_weights
        # Over the nominal batch size: close to the final gradients, so as safe in half precision as those.
        return (weights * losses).sum() / self.trainer.args.train_batch_size

    def finish_step(self) -> tuple[float, float]:
        """Normalise the gradients of the step; return its loss and the share of effective pairs."""
        trainer, own = self.trainer, self._sum
        sums = torch.tensor([own.total, own.total_of_squares, own.base], dtype=torch.float64)
        total, squares, base = sum_over_processes(trainer, sums)
        if total == 0:  # every pair of the step has weight 0, and every gradient is 0
            return 0.0, 0.0
        # Trainer and DistributedDataParallel average over micro-batches and processes; a sum is wanted.
        averaged = trainer.accelerator.num_processes * trainer.current_gradient_accumulation_steps
        scale_gradients(trainer.model, self.loss_weight * averaged * trainer.args.train_batch_size / total)
        value = -self.dr_beta * (math.log(total / base) + own.offset)
        return self.loss_weight * value, total**2 / (base * squares)

    def _offset_of_all(self, exponents: Tensor) -> float | None:
        """Return the offset of all processes in the last micro-batch of a step, else None."""
        accelerator = self.trainer.accelerator
        summed = accelerator.sync_gradients or accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        if accelerator.num_processes == 1 or not summed:
            return None
        offset = torch.tensor(self._sum.candidate(exponents.double().cpu()), device=exponents.device)
        torch.distributed.all_reduce(offset, op=torch.distributed.ReduceOp.MAX)
        return float(offset)


class TwoPassWeights:
    """Computes the losses of all micro-batches of a step without a graph first, so that weights are known in time.

    For what cannot wait until the gradients are summed: other losses in the same sum, the auxiliary loss of a
    mixture of experts, optimizers that step during the backward pass. It costs one forward pass more.
    """

    def __init__(self, trainer: Any, dr_beta: float, loss_weight: float) -> None:
        self.trainer = trainer
        self.dr_beta = dr_beta
        self.loss_weight = loss_weight
        self._log_sum = math.nan
        self._scale = math.nan
        self._result = (math.nan, math.nan)

    def start_step(self, micro_batches: list[Any], device: torch.device) -> None:
        """Sum exp(-loss / dr_beta) over the global batch; the batches keep the reference log-probabilities."""
        parts = BatchLogSum()
        for batch in micro_batches:
            losses, weights = self.trainer.losses_without_graph(batch)
            parts.add(exponents_of(losses, weights, self.dr_beta), weights)
        offset = parts.offset
        if self.trainer.accelerator.num_processes > 1:
            common = torch.tensor(offset, device=device)
            torch.distributed.all_reduce(common, op=torch.distributed.ReduceOp.MAX)
            offset = float(common)
        shift = math.exp(parts.offset - offset) if parts.offset > -math.inf else 0.0
        sums = torch.tensor([parts.total * shift, parts.total_of_squares * shift**2, parts.base], dtype=torch.float64)
        total, squares, base = sum_over_processes(self.trainer, sums)
        # Trainer and DistributedDataParallel average over micro-batches and processes; a sum is wanted.
        self._scale = self.loss_weight * self.trainer.accelerator.num_processes * len(micro_batches)
        if total == 0:  # every pair of the step has weight 0
            self._log_sum, self._result = 0.0, (0.0, 0.0)
            return
        self._log_sum = offset + math.log(total)
        value = -self.dr_beta * (self._log_sum - math.log(base))
        self._result = self.loss_weight * value, total**2 / (base * squares)

    def loss(self, losses: Tensor, base_weights: Tensor | None) -> Tensor:
        """Return what a micro-batch back-propagates, with the value of the global batch."""
        weights = torch.exp(exponents_of(losses, base_weights, self.dr_beta) - self._log_sum)
        if base_weights is not None:
            weights = weights * base_weights
        surrogate = self._scale * (weights * losses).sum()
        return surrogate + (self._result[0] - surrogate).detach()

    def finish_step(self) -> tuple[float, float]:
        """Return the loss of the global batch and the share of effective pairs."""
        return self._result


def exponents_of(losses: Tensor, base_weights: Tensor | None, dr_beta: float) -> Tensor:
    """Return -loss / dr_beta without a graph; -inf where the weight is 0, so that such a pair sets no offset."""
    exponents = losses.detach() / -dr_beta
    return exponents if base_weights is None else exponents.masked_fill(base_weights == 0, -math.inf)


def sum_over_processes(trainer: Any, sums: Tensor) -> list[float]:
    """Return the sums over all processes."""
    if trainer.accelerator.num_processes > 1:
        sums = trainer.accelerator.reduce(sums.to(trainer.accelerator.device), reduction="sum")
    return list(sums.tolist())


def scale_gradients(model: Any, factor: float) -> None:
    """Multiply all gradients of a model in place."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
