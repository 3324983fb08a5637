"""The data side of a private step: one Poisson batch for each step of the Trainer, already cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hfnoise.privacy.keyed_random import KeyedRandom
from hfnoise.privacy.sampling import PoissonSampler, micro_batches
from hfnoise.trainers.private_randomness import seeded
from hfnoise.trainers.private_units import Units

_DRAWS = ("collate", "forward")  # labels of the seeds of a micro-batch


@dataclass(frozen=True)
class StepPlan:
    """Which rows one process takes through the model in a step: one entry in each tuple for a micro-batch.

    `seeds` are those of the draws in collating the rows and in the forward pass, see `seeded`.
    """

    step: int
    rows: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]
    seeds: tuple[tuple[int, int], ...]


class StepPlans:
    """The batch sampler: yields the plans of an epoch, keyed by the step and by nothing else.

    The Trainer calls `set_epoch` on no sampler of this kind, so a sampler that is keyed by the epoch would repeat its
    batches in every one. On resume `skip_first_batches` drops the plans of the steps that are done.

    Args:
        sampler ([`PoissonSampler`]): draws the units of a step.
        units ([`Units`]): their rows.
        random ([`KeyedRandom`]): of the run.
        micro_batch_size (`int`): units per micro-batch.
        steps_per_epoch (`int`): length of an epoch.
        current_step (`Callable[[], int]`): the step the Trainer is at when an epoch begins.
        rank (`int`), world_size (`int`): of this process.
    """

    def __init__(
        self,
        sampler: PoissonSampler,
        units: Units,
        random: KeyedRandom,
        *,
        micro_batch_size: int,
        steps_per_epoch: int,
        current_step: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sampler, self._units, self._random = sampler, units, random
        self._micro_batch_size, self._steps_per_epoch = micro_batch_size, steps_per_epoch
        self._current_step, self._rank, self._world_size = current_step, rank, world_size

    def __len__(self) -> int:
        return self._steps_per_epoch

    def __iter__(self) -> Iterator[list[StepPlan]]:
        # In the middle of an epoch the Trainer skips what is done, counted from the beginning of the epoch.
        first = self._current_step() // self._steps_per_epoch * self._steps_per_epoch
        for step in range(first, first + self._steps_per_epoch):
            yield [self.plan(step)]

    def plan(self, step: int) -> StepPlan:
        """Return the part of this process in a step."""
        chosen = self._sampler.batch(self._random, step)
        batches = micro_batches(chosen, self._micro_batch_size, self._rank, self._world_size)
        parts = [self._units.rows(units, self._random, step) for units in batches]
        # By the place of the micro-batch among those of all processes: the same for every number of them.
        number = len(batches) * self._world_size
        seeds = [self._random.seeds(label, step, number)[self._rank :: self._world_size] for label in _DRAWS]
        rows, counts = zip(*parts, strict=True)
        return StepPlan(step, rows, counts, tuple(zip(*seeds, strict=True)))


@dataclass
class MicroBatch:
    """Rows for one forward and backward pass: the inputs, whether each row counts, and the seed of dropout."""

    inputs: dict[str, Any]
    counts: Tensor
    seed: int = 0


class PrivateBatch(list):
    """The micro-batches of one step. A list: the Trainer looks for labels and tokens in mappings only."""

    step: int = -1


class PlannedRows(Dataset):
    """A dataset indexed by plans: reads the rows and collates the micro-batches, in the workers of the loader.

    Args:
        rows: dataset with `len` and integer indices.
        collate (`Callable`): the data collator of the Trainer.
        padded (`bool`, defaults to `True`): keep the rows that do not count, so that all micro-batches have one size.
    """

    def __init__(self, rows: Any, collate: Callable[[list[Any]], dict[str, Any]], padded: bool = True) -> None:
        self._rows, self._collate, self._padded = rows, collate, padded

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, plan: StepPlan) -> PrivateBatch:
        batch = PrivateBatch()
        batch.step = plan.step
        for rows, counts, (of_collating, of_forward) in zip(plan.rows, plan.counts, plan.seeds, strict=True):
            if not self._padded:  # a micro-batch that is all padding still needs a row to run
                kept = counts if bool(counts.any()) else torch.arange(len(counts)) == 0
                rows, counts = rows[kept], counts[kept]
            with seeded(of_collating):  # also of a transform of the dataset
                inputs = self.collate_rows(rows)
            batch.append(MicroBatch(inputs, counts, of_forward))
        return batch

    def collate_rows(self, rows: Tensor) -> dict[str, Any]:
        """Return the inputs of the model for some rows of the dataset."""
        numbers = rows.tolist()
        if hasattr(self._rows, "__getitems__"):  # one read of the Arrow table
            return self._collate(self._rows.__getitems__(numbers))
        return self._collate([self._rows[number] for number in numbers])


def _only(items: list[PrivateBatch]) -> PrivateBatch:
    return items[0]


def plan_loader(rows: PlannedRows, plans: StepPlans, args: Any) -> DataLoader:
    """Return a plain loader of private batches; it is not to be prepared by accelerate, which would deal batches out.

    Args:
        rows ([`PlannedRows`]): the dataset.
        plans ([`StepPlans`]): the batch sampler.
        args (`TrainingArguments`): how many workers to use.
    """
    workers = args.dataloader_num_workers
    options: dict[str, Any] = {"persistent_workers": args.dataloader_persistent_workers} if workers else {}
    if workers and args.dataloader_prefetch_factor is not None:
        options["prefetch_factor"] = args.dataloader_prefetch_factor
    return DataLoader(rows, batch_sampler=plans, collate_fn=_only, num_workers=workers, **options)


def unit_of_rows(size: int, rows_per_unit: int, copies: int, device: torch.device) -> Tensor:
    """Return the place of the unit that each row of the model's batch belongs to.

    Args:
        size (`int`): units in the micro-batch.
        rows_per_unit (`int`): rows of the dataset for each of them, adjacent.
        copies (`int`): rows that the collator makes of a row of the dataset: 2 for preference pairs, of which it puts
            all chosen answers first.
        device (`torch.device`): where.
    """
    return torch.arange(size, device=device).repeat_interleave(rows_per_unit).repeat(copies)
