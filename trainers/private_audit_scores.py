"""Scores of canaries: how much training lowered the loss of each, or how far it went along its clipped gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hfnoise.privacy.audit_decorrelation import decorrelated_scores, sketch
from hfnoise.privacy.clipping import clip_per_unit
from hfnoise.privacy.gradient_recorder import UnitGradientRecorder
from hfnoise.privacy.keyed_random import KeyedRandom
from hfnoise.privacy.sampling import micro_batches
from hfnoise.trainers.private_batches import MicroBatch, PlannedRows, unit_of_rows
from hfnoise.trainers.private_check import check_trainer
from hfnoise.trainers.private_units import Units

# A unit with more rows than a step may use is scored by one choice of them, which need not be secret.
_PUBLIC_CHOICE = KeyedRandom(bytes(32))


class CanaryRows:
    """The canaries as the model takes them, whether or not they are in the training data.

    Args:
        rows ([`PlannedRows`]): a dataset that holds all canaries, tokenised and collated as the training rows are.
        numbers (`Tensor[rows]`): where they lie in it.
        units ([`Units`]): which of these rows make a canary.
    """

    def __init__(self, rows: PlannedRows, numbers: Tensor, units: Units) -> None:
        self._rows, self._numbers, self._units = rows, numbers, units
        self.count, self.max_rows = units.count, units.max_rows

    def micro_batch(self, canaries: Tensor) -> MicroBatch:
        """Return some canaries, -1 for an empty place, as a step would take them through the model."""
        rows, counts = self._units.rows(canaries, _PUBLIC_CHOICE, 0)
        return MicroBatch(self._rows.collate_rows(self._numbers[rows]), counts)

    def alone(self, canary: int) -> dict[str, Any]:
        """Return the inputs of the model for one canary."""
        rows, counts = self._units.rows(torch.tensor([canary]), _PUBLIC_CHOICE, 0)
        return self._rows.collate_rows(self._numbers[rows[counts]])


def canary_losses(trainer: Any, canaries: CanaryRows) -> Tensor:
    """Return the loss of the Trainer for each canary alone, `Tensor[canaries]`: all that a black-box audit sees.

    Args:
        trainer ([`DPTrainerMixin`]): whose model and loss are used as they are now.
        canaries ([`CanaryRows`]): to be scored.
    """
    losses = torch.zeros(canaries.count, dtype=torch.float64)
    with _only_looking(trainer), torch.no_grad():
        for canary in _progress(trainer, range(canaries.count), "Audit: losses of canaries"):
            losses[canary] = _loss(trainer, canaries.alone(canary), None).double().cpu()
    return losses


def canary_alignments(trainer: Any, canaries: CanaryRows, start: dict[str, Tensor]) -> Tensor:
    """Return how well each canary's clipped gradient explains the whole update, `Tensor[canaries]`: white box.

    A step of gradient descent moves the weights against the sum of clipped gradients, so start - end is large along
    the clipped gradient of a canary that was in (arXiv 2305.08846, section 6). The gradients are those at the start of
    training; of a fresh LoRA they concern B, since A has no gradient at B = 0. Departure: the inner products are
    decorrelated, see [`~hfnoise.privacy.audit_decorrelation.decorrelated_scores`].

    Args:
        trainer ([`DPTrainerMixin`]): after training.
        canaries ([`CanaryRows`]): to be scored.
        start (`dict[str, Tensor]`): the trained parameters before training.
    """
    parameters = dict(trainer.model.named_parameters())
    update = {name: (value - parameters[name].detach()).float() for name, value in start.items()}
    end = {name: parameters[name].detach().clone() for name in start}
    products: list[Tensor] = []
    sketches: list[Tensor] = []
    with _only_looking(trainer), torch.enable_grad():
        try:
            _put(parameters, start)
            for gradients, places in _gradients(trainer, canaries):
                for unit in places.nonzero().flatten().tolist():
                    clipped = _clipped(trainer, gradients, unit)
                    products.append(sum((clipped[name] * update[name]).double().sum().cpu() for name in update))
                    sketches.append(sketch(torch.cat([clipped[name].flatten() for name in update])[None]).cpu())
        finally:
            _put(parameters, end)
    return decorrelated_scores(torch.stack(products), torch.cat(sketches), _noise_variance(trainer))


def _clipped(trainer: Any, gradients: dict[str, Tensor], unit: int) -> dict[str, Tensor]:
    """Return the gradient of one unit, clipped by the very function that training uses."""
    single = {name: value[unit : unit + 1] for name, value in gradients.items()}
    clipped: dict[str, Tensor] = clip_per_unit(single, trainer.dp_config.clip_norm, trainer.dp_config.clipping).summed
    return clipped


def _noise_variance(trainer: Any) -> float:
    """Return the variance of the claimed noise in the sum of all steps, by that of one participation in each."""
    run, config = trainer.private_run.state, trainer.dp_config
    steps = max(1, trainer.state.global_step)
    return float((run.noise_multiplier * config.clip_norm) ** 2 / (steps * run.sample_rate**2))


def _gradients(trainer: Any, canaries: CanaryRows) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the per-unit gradients of each micro-batch of canaries, and which of its places hold one."""
    scale = check_trainer(trainer, trainer.model).scale
    loop = trainer.dp_config.grad_mode == "loop"
    size = 1 if loop else trainer._micro_batch_size
    batches = _progress(trainer, micro_batches(torch.arange(canaries.count), size), "Audit: gradients of canaries")
    if loop:
        for places in batches:
            yield _gradient_alone(trainer, canaries.alone(int(places))), places >= 0
        return
    device = trainer.args.device
    unit = unit_of_rows(size, canaries.max_rows, scale.copies, device)
    with UnitGradientRecorder(trainer.model, size) as recorder:
        for places in batches:
            batch = canaries.micro_batch(places)
            weights = scale.row_weights(batch.inputs, batch.counts, canaries.max_rows).repeat(scale.copies)
            with recorder.record(unit, weights.to(device)):
                _loss(trainer, batch.inputs, scale.num_items_in_batch).backward()
            yield recorder.collect(), places >= 0
            recorder.reset()


def _gradient_alone(trainer: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    parameters = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(
        _loss(trainer, inputs, None), list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return {name: value[None] for name, value in zip(parameters, gradients, strict=True)}


def _loss(trainer: Any, inputs: dict[str, Any], items: float | None) -> Tensor:
    with trainer.compute_loss_context_manager():
        loss: Tensor = trainer.compute_loss(
            trainer.model, trainer._prepare_inputs(dict(inputs)), num_items_in_batch=items
        )
    return loss


def _put(parameters: dict[str, Any], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _progress(trainer: Any, items: Any, title: str) -> Any:
    hide = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    return tqdm(items, desc=title, disable=hide)


@contextmanager
def _only_looking(trainer: Any) -> Iterator[None]:
    """Switch dropout off, and put everything back that a loss leaves behind in a Trainer."""
    modes = {module: module.training for module in trainer.model.modules()}
    kept = {name: copy.deepcopy(getattr(trainer, name)) for name in _TRACKED if hasattr(trainer, name)}
    trainer.model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, value in kept.items():
            setattr(trainer, name, value)


_TRACKED = ("_metrics", "_total_train_tokens")  # of TRL: averages for the next log
