"""dp_audit: train once with secretly chosen canaries, guess who was in, and see whether the claim can hold."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from hfnoise.privacy.accounting import check_delta, composed_epsilon
from hfnoise.privacy.audit import audit_scores, default_guesses
from hfnoise.privacy.audit_bounds import DEFAULT_SIGNIFICANCE
from hfnoise.privacy.hf_fingerprint import dataset_fingerprint
from hfnoise.privacy.keyed_random import KeyedRandom
from hfnoise.privacy.secret_file import run_key, unsafe_secret
from hfnoise.trainers.private_audit_result import AuditResult
from hfnoise.trainers.private_audit_scores import CanaryRows, canary_alignments, canary_losses
from hfnoise.trainers.private_dataset import privacy_folder
from hfnoise.trainers.private_units import Units, unit_names

logger = logging.getLogger(__name__)

_SCORES = ("gradient", "loss")
_FEWEST = 10  # with fewer, coins that all fall on one side are no rare event


def dp_audit(
    make_trainer: Callable[[Dataset], Any],
    dataset: Dataset,
    canaries: Dataset,
    *,
    delta: float | None = None,
    score: str = "gradient",
    guesses: int | tuple[int, int] | None = None,
    significance: float = DEFAULT_SIGNIFICANCE,
    assume_gaussian: bool = False,
    unsafe_seed: int | None = None,
) -> AuditResult:
    """Return a lower bound on the epsilon of a private training, from one run (arXiv 2305.08846).

    Each canary is put into the training data by a secret fair coin of its own; the Trainer is trained once; every
    canary is scored; those with the highest scores are guessed to be in, those with the lowest to be out, the rest is
    left open. More right guesses than an (epsilon, delta)-private training allows refute the claim.

    It finds bugs (noise missing or too small, clipping not applied, batches that are not drawn independently). It
    never certifies an epsilon: a small bound may as well be a weak attack.

    Formal guarantee: with probability 1 - `significance` the bound does not exceed the true epsilon. That holds if a
    canary is one unit, the numbers of guesses are fixed before looking (they are: `guesses`, or the sequence of
    [`~hfnoise.privacy.audit.default_guesses`] with a union bound over it), and the coins are seen by nobody who
    scores. They come from the operating system, not from torch, whose seed is public. Departure: the number of
    canaries that are in is known to the training, as the number of its units is; the guesses make no use of it.

    The run is a run like others on the data: it is charged to the ledger of `dataset`, and its model, which also knows
    the canaries, may be released. Make the audited run with the settings of the one you want to know about.

    Args:
        make_trainer (`Callable[[Dataset], Trainer]`): builds a private Trainer (`DPSFTTrainer`, ..., or what
            `make_private` returns) on the dataset it is given, with a model of its own. It is called twice: the first
            Trainer only prepares the canaries and is dropped.
        dataset (`datasets.Dataset`): the training data, before tokenising.
        canaries (`datasets.Dataset`): the canaries, with the columns of `dataset`; [`make_canaries`] makes some. With
            `unit_column` a canary is all rows of one of its values, which must not occur in `dataset`. At least 10,
            sensibly 200 to 5000: the largest bound that 100 can give is 3.5, 1000 give 5.8.
        delta (`float`, *optional*): of the claim, in (0, 1); that of the Trainer by default.
        score (`str`, defaults to `"gradient"`): `"gradient"`, white box: the inner product of the update of the
            trained parameters with the canary's clipped gradient at the start; or `"loss"`, black box: how much
            training lowered the loss of the canary.
        guesses (`int` or `tuple[int, int]`, *optional*): how many are guessed in and how many out; one number stands
            for both. Fix them before the first look: a number chosen afterwards voids the bound.
        significance (`float`, defaults to 0.05): probability of a bound that is too large, in (0, 1).
        assume_gaussian (`bool`, defaults to `False`): a tighter bound for trainings whose trade-off curve is that of
            a Gaussian mechanism (arXiv 2410.22235).
        unsafe_seed (`int`, *optional*): coins that anybody can recompute, for tests.

    Returns:
        [`AuditResult`]; its numbers are kept as `trainer.audit_result` for the report and the card.

    Raises:
        TypeError, ValueError: for canaries without the columns of the dataset, fewer than 10, or a Trainer that is not
            private.

    Example:
        >>> from hfnoise import dp_audit, make_canaries
        >>> canaries = make_canaries(["red", "green", "blue"], m=4)
        >>> dp_audit(lambda dataset: None, canaries, canaries)
        Traceback (most recent call last):
        ...
        ValueError: an audit needs at least 10 canaries, got 4. Sensible are 200 to 5000.
    """
    _check(dataset, canaries, delta, score)
    canaries = canaries.select_columns(dataset.column_names)
    if canaries.features != dataset.features:
        canaries = canaries.cast(dataset.features)
    prepared = make_trainer(concatenate_datasets([dataset, canaries]))
    rows, units, names = _prepare(prepared, dataset, canaries)
    guessed = _guesses(guesses, units.count)
    coins = _coins(units.count, unsafe_seed)
    del prepared  # its model, before the next one is built
    if names is None:
        chosen = coins.nonzero().flatten()
    else:
        chosen = torch.tensor([row for row, name in enumerate(names) if bool(coins[name])], dtype=torch.int64)
    trainer = make_trainer(concatenate_datasets([dataset, canaries.select(chosen.tolist())]))
    _charge_to(trainer, dataset)
    scores = _train_and_score(trainer, rows, score)
    result = AuditResult(
        claimed_epsilon=_claimed(trainer, delta),
        estimate=audit_scores(
            scores[coins],
            scores[~coins],
            trainer.target_delta if delta is None else delta,
            significance=significance,
            candidates=guessed,
            assume_gaussian=assume_gaussian,
        ),
        score=score,
        scores=scores,
        included=coins,
        trainer=trainer,
    )
    trainer.audit_result = result.to_dict()
    logger.info("audit: %s", result.verdict)
    return result


def _check(dataset: Any, canaries: Any, delta: float | None, score: str) -> None:
    for name, value in (("dataset", dataset), ("canaries", canaries)):
        if not isinstance(value, Dataset):
            raise TypeError(f"{name} must be a datasets.Dataset, got {type(value).__name__}.")
    if len(canaries) < _FEWEST:
        raise ValueError(f"an audit needs at least {_FEWEST} canaries, got {len(canaries)}. Sensible are 200 to 5000.")
    if set(dataset.column_names) != set(canaries.column_names):
        raise ValueError(
            f"canaries have the columns {sorted(canaries.column_names)}, the dataset {sorted(dataset.column_names)}: "
            "a canary must be a row like the others. Give both the same columns."
        )
    if score not in _SCORES:
        raise ValueError(f"score must be 'gradient' (white box) or 'loss' (black box), got {score!r}.")
    if delta is not None:
        check_delta(delta)


def _prepare(trainer: Any, dataset: Dataset, canaries: Dataset) -> tuple[CanaryRows, Units, list[int] | None]:
    """Return the canaries as a Trainer prepares them, their units, and the number of the unit of each row."""
    if not getattr(trainer, "_is_private", False):
        raise ValueError(
            f"make_trainer must return a private Trainer, got {type(trainer).__name__}: nothing else claims an "
            "epsilon. Use DPTrainer, DPSFTTrainer, DPDPOTrainer or make_private."
        )
    whole = len(dataset) + len(canaries)
    if len(trainer.train_dataset) != whole:
        raise ValueError(
            f"the Trainer made {len(trainer.train_dataset)} rows of {whole}: dropped rows leave open which canary is "
            "which. Filter dataset and canaries before, so that the Trainer keeps every row."
        )
    units, numbers = Units(len(canaries)), None
    column = trainer.dp_config.unit_column
    if column is not None:
        names = unit_names(canaries, column)
        shared = set(names) & set(unit_names(dataset, column))
        if shared:
            raise ValueError(
                f"canaries share values of unit_column={column!r} with the dataset ({sorted(map(str, shared))[:3]}): "
                "a canary must be a whole unit, in or out. Give it a value of its own."
            )
        order = {name: number for number, name in enumerate(dict.fromkeys(names))}
        numbers = [order[name] for name in names]
        units = Units(len(names), names, trainer.dp_config.max_rows_per_unit)
    if units.count < _FEWEST:
        raise ValueError(f"an audit needs at least {_FEWEST} canaries, got {units.count} units.")
    rows = CanaryRows(trainer.planned_rows(), torch.arange(len(dataset), whole), units)
    return rows, units, numbers


def _coins(count: int, unsafe_seed: int | None) -> Tensor:
    """Return a fair coin for each canary, the same on every process."""
    secret = os.urandom(32) if unsafe_seed is None else unsafe_secret(unsafe_seed)
    (secret,) = broadcast_object_list([secret])
    coins: Tensor = KeyedRandom(run_key(secret, "audit")).uniforms("coins", 0, count) < 0.5
    return coins


def _guesses(guesses: int | tuple[int, int] | None, count: int) -> list[tuple[int, int]]:
    if guesses is None:
        return default_guesses(count)
    return [(guesses, guesses) if isinstance(guesses, int) else (guesses[0], guesses[1])]


def _charge_to(trainer: Any, dataset: Dataset) -> None:
    """Charge the run to the dataset itself: with canaries it is another dataset at every audit, and a new ledger."""
    trainer.fingerprint = dataset_fingerprint(dataset)
    config = trainer.dp_config
    if config.ledger_file is None and config.secret_file is None and config.unsafe_seed is None:
        trainer._ledger_file = privacy_folder(trainer.fingerprint) / "ledger.json"


def _train_and_score(trainer: Any, rows: CanaryRows, score: str) -> Tensor:
    if score == "loss":
        before = canary_losses(trainer, rows)
        trainer.train()
        scores = before - canary_losses(trainer, rows)
    else:
        start = {
            name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad
        }
        trainer.train()
        scores = canary_alignments(trainer, rows, start)
    # A loss that is no number says nothing about who was in: such canaries go to the bottom, whoever they are.
    finite: Tensor = scores.nan_to_num(nan=-torch.finfo(scores.dtype).max)
    return finite


def _claimed(trainer: Any, delta: float | None) -> float:
    run = trainer.private_run
    mechanism = run.state.mechanism(trainer.state.global_step)
    return composed_epsilon([mechanism], run.state.delta if delta is None else delta, run.state.accountant)
