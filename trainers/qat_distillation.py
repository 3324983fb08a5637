"""Distillation from the full-precision model: the divergence of the quantised model's logits from the teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, count: Tensor | int | None = None
) -> Tensor:
    """Return T^2 KL(teacher || student) at temperature T, averaged over the predictions that have a label.

    Hinton et al., arXiv 1503.02531, section 2: the factor T^2 keeps the size of the gradient.

    Args:
        student, teacher (`torch.Tensor` of shape `(..., classes)`): logits; computed in float32.
        labels (`torch.Tensor` of shape `(...)`): -100 where nothing is predicted. Aligned with the logits: shift
            them first.
        temperature (`float`, defaults to 1.0): T, above 0.
        count (`torch.Tensor` or `int`, *optional*): predictions to divide by, where the batch is a part of a larger
            one; those of this batch by default.

    Returns:
        `torch.Tensor`: a scalar in float32, differentiable in `student`.

    Raises:
        ValueError: if shapes do not match.

    Example:
        >>> import torch
        >>> from hfnoise.trainers.qat_distillation import distillation_loss
        >>> logits = torch.tensor([[2.0, 0.0], [5.0, 0.0]])
        >>> distillation_loss(logits, logits + 1, torch.tensor([0, -100])).item()
        0.0
    """
    if student.shape != teacher.shape or labels.shape != student.shape[:-1]:
        raise ValueError(
            f"logits of student and teacher have shapes {tuple(student.shape)} and {tuple(teacher.shape)}, labels "
            f"{tuple(labels.shape)}; the first two are equal, and the last is theirs without the classes."
        )
    chosen = labels != -100
    log_student = functional.log_softmax(student[chosen].float() / temperature, -1)
    log_teacher = functional.log_softmax(teacher[chosen].float() / temperature, -1)
    total = functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return temperature**2 * total / (chosen.sum().clamp(min=1) if count is None else count)


class DistillationMixin:
    """The part of [`~hfnoise.QATTrainerMixin`] that adds the teacher to the loss of training; evaluation has none."""

    args: Any
    accelerator: Any
    model: Any
    _teacher: Any = None
    _distilled: Tensor | None = None
    _distilled_from = 0

    def _check_distillation(self, after: Any) -> None:
        """Raise a ValueError where there would be no logits to compare, or too many processes in one."""
        from transformers import Trainer

        if after.compute_loss is not Trainer.compute_loss:
            raise ValueError(
                f"distillation_weight needs logits, and {after.__name__} computes its loss without them. Use "
                "QATTrainer, or distillation_weight=0."
            )
        if self.args.use_liger_kernel:
            raise ValueError("distillation_weight needs logits, and use_liger_kernel makes none. Leave one out.")
        if self.args.n_gpu > 1:
            raise ValueError("distillation_weight does not run under DataParallel; launch one process per GPU.")
        self._teacher.to(self.args.device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return (1 - w) times the Trainer's loss plus w times the distillation loss; in evaluation its own."""
        compute: Any = super().compute_loss  # type: ignore[misc]
        if self._teacher is None or not model.training:
            return compute(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)  # label smoothing takes the labels out
        labels = given.pop("shift_labels", None)
        shifted = labels is None and self._loss_shifts_labels  # type: ignore[attr-defined]
        labels = given["labels"] if labels is None else labels
        given.pop("labels", None)
        loss, outputs = compute(model, inputs, True, num_items_in_batch)
        with torch.no_grad(), self.accelerator.autocast():
            teacher = self._teacher(**given).logits
        student = outputs["logits"]
        if shifted:
            student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
        distilled = distillation_loss(student, teacher, labels, self.args.distillation_temperature, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # As the Trainer's own loss: the count is that of all ranks, and DDP averages over them.
            distilled = distilled * self.accelerator.num_processes
        self._note_distilled(distilled.detach(), num_items_in_batch)
        weight = self.args.distillation_weight
        loss = (1 - weight) * loss + weight * distilled
        return (loss, outputs) if return_outputs else loss

    def _note_distilled(self, loss: Tensor, count: Any) -> None:
        if count is None:
            loss = loss / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        if self._distilled is None:
            self._distilled, self._distilled_from = loss, self.state.global_step  # type: ignore[attr-defined]
        else:
            self._distilled = self._distilled + loss

    def _distillation_log(self) -> dict[str, float]:
        """Return the mean distillation loss since the last call, of all ranks; called on all of them."""
        if self._distilled is None:
            return {}
        steps = self.state.global_step - self._distilled_from  # type: ignore[attr-defined]
        mean = self.accelerator.gather(self._distilled.reshape(1)).mean().item() / max(1, steps)
        self._distilled = None
        return {"qat/distillation_loss": mean}
