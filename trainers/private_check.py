"""dp_check: is the loss a sum over units, is every trainable parameter covered, do per-unit gradients agree?"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfnoise.privacy.gradient_recorder import UnitGradientRecorder
from hfnoise.trainers.private_check_rows import CheckRows, check_rows
from hfnoise.trainers.private_scale import LossScale, row_tokens
from hfnoise.trainers.private_training_mode import kept_values, training_mode

logger = logging.getLogger(__name__)

_ROWS = 3
# Relative error of a gradient that counts as agreement. Batched and single matrix products differ by about 1e-6 in
# float32, and by 1e-2 where bfloat16 rounds; terms that do depend on the batch are off by 0.1 and more.
_TOLERANCE = 1e-4
_TOLERANCE_CUDA = 1e-3  # TF32
_TOLERANCE_BF16 = 5e-2
_SAME = 1e-6  # relative; two guesses of a loss that differ by rounding only


@dataclass(frozen=True)
class PrivacyCheck:
    """What `dp_check` found; it raises where the answer is no.

    Args:
        scale ([`LossScale`]): how the Trainer adds losses up; its reduction is `"alone"` with `grad_mode="loop"`,
            which takes every unit alone, so that there is nothing to compare.
        covered (`list[str]`): trainable parameters whose per-unit gradients are known.
        error_alone (`float`): largest relative distance between the gradient of a row in a batch and alone.
        error_sum (`float`): relative distance between the sum of the per-row gradients and the ordinary gradient.
    """

    scale: LossScale
    covered: list[str] = field(default_factory=list)
    error_alone: float = 0.0
    error_sum: float = 0.0


def dp_check(trainer: Any) -> PrivacyCheck:
    """Return what makes a private Trainer right, or raise; it runs by itself before the first step.

    On synthetic rows and with perturbed weights (a fresh LoRA has B = 0, where many losses look alike): the gradient
    of a row in a batch equals the gradient of that row alone, collated alone, so without padding; the sum over rows
    equals the ordinary gradient; every trainable parameter is covered.

    Formal guarantee: none; a test that can refute, on three rows, one set of weights and with dropout off. It does not
    see what mixes rows in training mode only. The rows are the shortest, the middle and the longest of 32, so that a
    model whose output depends on the amount of padding is found, unless all of them are equally long.

    Args:
        trainer ([`DPTrainerMixin`]): a private Trainer.

    Returns:
        [`PrivacyCheck`]

    Raises:
        ValueError: if the loss of a row depends on other rows, or a trainable parameter is not covered: clipping would
            then not bound what a unit changes, and the stated epsilon would be false.
    """
    if not getattr(trainer, "_is_private", False):
        raise ValueError(
            f"dp_check needs a private Trainer, got {type(trainer).__name__}. Use DPTrainer, DPSFTTrainer, "
            "DPDPOTrainer or make_private(trainer, DPConfig(...)), which run it by themselves before the first step."
        )
    return check_trainer(trainer, trainer.model)


def check_trainer(trainer: Any, model: Any) -> PrivacyCheck:
    """Return the result of the check for a prepared model; see [`dp_check`]."""
    model = getattr(model, "_orig_mod", model)  # to compile for three rows takes longer than the check
    parameters = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    if not parameters:
        raise ValueError("the model has no trainable parameter: nothing would be trained. Pass a peft_config.")
    loop = trainer.dp_config.grad_mode == "loop"
    with _as_for_the_check(trainer, parameters):
        rows = check_rows(trainer.planned_rows(), trainer.model, 1 if loop else _ROWS)
        _refuse_kept_values(trainer, rows)
        if loop:
            # Every unit goes through the model alone, so nothing it could depend on is there.
            return PrivacyCheck(LossScale("alone", copies=1, shifts_labels=False), list(parameters))
        alone = [_gradient(trainer, model, parameters, single, None)[0] for single in rows.singles]
        scale, found, ordinary = _batch_gradients(trainer, model, parameters, rows)
    inputs = rows.batch
    weights = scale.row_weights(inputs, torch.ones(_ROWS, dtype=torch.bool), rows_per_unit=1)
    errors = [
        _distance({name: value[row] * weights[row].item() for name, value in found.items()}, alone[row])
        for row in range(_ROWS)
    ]
    sums = {name: value.sum(0) for name, value in found.items()}
    result = PrivacyCheck(scale, list(parameters), max(errors), _distance(sums, ordinary))
    _judge(trainer, result)
    return result


def _refuse_kept_values(trainer: Any, rows: CheckRows) -> None:
    """Raise ValueError if a forward pass in training mode leaves something behind that is saved with the weights."""
    before = kept_values(trainer.model)
    with training_mode(trainer.model), torch.enable_grad():  # as in training: checkpointing warns without
        _compute(trainer, trainer.model, rows.singles[0], None)
    changed = [name for name, value in kept_values(trainer.model).items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"a forward pass in training mode writes into {', '.join(changed[:3])}, which is saved with the weights: "
            "numbers of private rows would be released without noise. Freeze these statistics, or use a model without."
        )


def _judge(trainer: Any, result: PrivacyCheck) -> None:
    tolerance = _tolerance(trainer)
    name = type(trainer).__name__
    if not result.error_alone <= tolerance:
        raise ValueError(
            f"{name} cannot be private with these settings: the gradient of a row in a batch differs from that of the "
            f"row alone by {result.error_alone:.2g} (relative; allowed {tolerance:g}). The loss of a unit depends on "
            "the other rows of the batch, so clipping does not bound what one unit changes, and the stated epsilon "
            "would be false. Use a loss that is a mean over rows, tokens or pairs; a collator that pads such that the "
            "model's output does not change (on the right, or with attention_mask and position_ids); or "
            "grad_mode='loop', which takes every unit alone."
        )
    if not result.error_sum <= tolerance:
        raise ValueError(
            f"the per-unit gradients of {name} do not add up to the ordinary gradient (relative distance "
            f"{result.error_sum:.2g}, allowed {tolerance:g}): a part of a parameter's influence would not be clipped. "
            "Use grad_mode='loop', and report the model to us."
        )


def _tolerance(trainer: Any) -> float:
    dtypes = {value.dtype for value in trainer.model.parameters()}
    low = {torch.bfloat16, torch.float16, torch.uint8, torch.int8} & dtypes
    if trainer.accelerator.mixed_precision != "no" or low:
        return _TOLERANCE_BF16
    return _TOLERANCE_CUDA if trainer.args.device.type == "cuda" else _TOLERANCE


def _batch_gradients(
    trainer: Any, model: Any, parameters: dict[str, nn.Parameter], rows: CheckRows
) -> tuple[LossScale, dict[str, Tensor], dict[str, Tensor]]:
    """Return how the batch is reduced, its per-row gradients and its ordinary gradient."""
    sums = bool(trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None) and "labels" in rows.batch
    items = 1.0 if sums else None
    ordinary, total = _gradient(trainer, model, parameters, rows.batch, items)
    singles = torch.stack([_loss(trainer, model, single, None) for single in rows.singles]).double()
    scale = _find_reduction(trainer, rows, singles, total, items)
    if scale.num_items_in_batch != items:
        ordinary, _ = _gradient(trainer, model, parameters, rows.batch, scale.num_items_in_batch)
    with UnitGradientRecorder(trainer.model, _ROWS) as recorder:
        unit = torch.arange(_ROWS, device=trainer.args.device).repeat(scale.copies)
        with recorder.record(unit, torch.ones(len(unit), device=trainer.args.device)):
            _backward(trainer, model, rows.batch, scale.num_items_in_batch)
        found = {name: value.cpu() for name, value in recorder.collect().items()}
    return scale, found, ordinary


def _find_reduction(trainer: Any, rows: CheckRows, singles: Tensor, total: Tensor, items: float | None) -> LossScale:
    """Return the rule by which the losses of the rows make the loss of the batch; the nearest, to be judged later."""
    stock = bool(getattr(trainer, "_loss_shifts_labels", False))
    guesses: dict[LossScale, float] = {}
    # transformers knows by the name of a class whether its loss shifts labels, and GPT2LMHeadModel has no such name.
    for shifts in (stock, not stock) if "labels" in rows.batch and rows.copies == 1 else ():
        tokens = row_tokens(rows.batch, shifts).double().cpu()
        if not bool(tokens.all()):
            continue
        by_tokens = float((singles * tokens).sum())
        if items is not None:
            guesses[LossScale("sum", rows.copies, shifts)] = by_tokens
        # Also where the Trainer says what to divide by: a compute_loss of the user's need not listen.
        guesses[LossScale("token_mean", rows.copies, shifts)] = by_tokens / float(tokens.sum())
    # Last: where each row has one label both means are the same, but rows with the label -100 are not counted.
    guesses[LossScale("mean", rows.copies, stock)] = float(singles.mean())
    errors = {scale: abs(guess - float(total)) for scale, guess in guesses.items()}
    least = min(errors.values())
    return next(scale for scale, error in errors.items() if error <= least + _SAME * abs(float(total)))


def _gradient(
    trainer: Any, model: Any, parameters: dict[str, nn.Parameter], inputs: dict[str, Any], items: float | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the ordinary gradient of a batch, on the CPU, and its loss."""
    loss = _backward(trainer, model, inputs, items)
    gradient = {
        name: torch.zeros_like(value, device="cpu") if value.grad is None else value.grad.detach().float().cpu()
        for name, value in parameters.items()
    }
    for value in parameters.values():
        value.grad = None
    return gradient, loss


def _backward(trainer: Any, model: Any, inputs: dict[str, Any], items: float | None) -> Tensor:
    with trainer.accelerator.no_sync(model), torch.enable_grad():
        loss = _compute(trainer, model, inputs, items)
        loss.backward()
    return loss.detach().cpu()


def _loss(trainer: Any, model: Any, inputs: dict[str, Any], items: float | None) -> Tensor:
    with torch.no_grad():
        return _compute(trainer, model, inputs, items).detach().cpu()


def _compute(trainer: Any, model: Any, inputs: dict[str, Any], items: float | None) -> Tensor:
    with trainer.compute_loss_context_manager():
        loss: Tensor = trainer.compute_loss(model, trainer._prepare_inputs(dict(inputs)), num_items_in_batch=items)
    return loss


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference by the norm of what is expected, over all parameters."""
    difference = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    size = sum(float(value.double().square().sum()) for value in expected.values())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float((difference / size) ** 0.5)


@contextmanager
def _as_for_the_check(trainer: Any, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Perturb the weights, switch dropout off, and put everything back: metrics, gradients, random state."""
    modes = {module: module.training for module in trainer.model.modules()}
    metrics = copy.deepcopy(getattr(trainer, "_metrics", None))
    tokens = getattr(trainer, "_total_train_tokens", None)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    devices = [trainer.args.device.index or 0] if trainer.args.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for module in modes:
            # bitsandbytes packs 4-bit weights for the CPU anew when it leaves the training mode.
            module.training = type(module).__module__.startswith("bitsandbytes")
        generator = torch.Generator().manual_seed(0)
        try:
            with torch.no_grad():
                for value in parameters.values():
                    # A tenth of the size of the weights, and something where they are all 0.
                    size = 0.1 * value.float().square().mean().sqrt().item() + 0.01
                    noise = torch.randn(value.shape, generator=generator) * size
                    value.add_(noise.to(value.device, value.dtype))
            yield
        finally:
            with torch.no_grad():
                for name, value in parameters.items():
                    value.copy_(before[name])
                    value.grad = None
            for module, mode in modes.items():
                module.training = mode
            if metrics is not None:
                trainer._metrics = metrics
            if tokens is not None:
                trainer._total_train_tokens = tokens
