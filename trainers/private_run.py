"""One private run: its key, its noise, its budget and its place in the ledger; written into every checkpoint."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from hfnoise.errors import CheckpointError
from hfnoise.option_types import wrong_type
from hfnoise.privacy.accounting import Mechanism, Search, composed_epsilon
from hfnoise.privacy.calibration import calibrate_noise_multiplier, largest_step_count
from hfnoise.privacy.keyed_random import KeyedRandom
from hfnoise.privacy.ledger import Ledger, LedgerEntry
from hfnoise.privacy.secret_file import run_key
from hfnoise.strict_json import parse_json

logger = logging.getLogger(__name__)

STATE_FILE = "dp_state.json"
UNSAFE = "unsafe_seed"
# The unit without `unit_column`: one row of the dataset, which every other unit consists of.
ROW_UNITS = ("row", "preference pair")
_VERSION = 1
# Of a budget; beyond it the rest buys only noise that drowns everything.
SPENT = 0.98
# What must agree for a checkpoint to be this run at all: other values are another mechanism.
_MECHANISM = (
    "fingerprint", "units", "unit", "expected_batch_size", "delta", "clip_norm", "clipping", "noise",
    "max_rows_per_unit", "accountant",
)  # fmt: skip


@dataclass(frozen=True)
class RunState:
    """What a checkpoint says of a private run; nothing in it is secret.

    Args:
        run_id (`str`): name of the run, part of the key of its noise.
        secret (`str`): name of the secret, which tells nothing about it, or "unsafe_seed N".
        fingerprint (`str`): hash of the dataset.
        units (`int`): number of units N.
        unit (`str`): what a unit is.
        expected_batch_size (`int`): B; the sample rate is B / N.
        noise_multiplier (`float`): sigma.
        delta (`float`): of the guarantee.
        target_epsilon (`float`, *optional*): the budget, if there is one.
        clip_norm (`float`), clipping (`str`), noise (`str`), bands (`int`), accountant (`str`),
            max_rows_per_unit (`int`): as in [`DPConfig`].
        first_step (`int`): the step at which this run began; above 0 where a resume with other settings branched off.
        planned_steps (`int`): the step at which it is to end; correlated noise depends on it.
        global_step (`int`): steps done when this was written.
        started (`str`): when the run began, ISO 8601.
        earlier (`list`): mechanisms of the runs whose weights this one started from, `[sample_rate, noise_multiplier,
            steps, bands]` each: its weights depend on them too.
        settings (`dict`): what makes the steps: optimizer, learning rate, seeds.
    """

    run_id: str
    secret: str
    fingerprint: str
    units: int
    unit: str
    expected_batch_size: int
    noise_multiplier: float
    delta: float
    target_epsilon: float | None
    clip_norm: float
    clipping: str
    noise: str
    bands: int
    accountant: str
    max_rows_per_unit: int
    first_step: int
    planned_steps: int
    global_step: int = 0
    started: str = ""
    earlier: list[list[Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def sample_rate(self) -> float:
        """Probability that a unit is in a batch."""
        return self.expected_batch_size / self.units

    def mechanism(self, last_step: int) -> Mechanism:
        """Return what this run has released after `last_step` steps of the Trainer."""
        return Mechanism(self.sample_rate, self.noise_multiplier, max(0, last_step - self.first_step), self.bands)

    def released(self, last_step: int) -> list[list[Any]]:
        """Return `lineage` as numbers, for the `earlier` of a run that goes on from these weights."""
        return [[one.sample_rate, one.noise_multiplier, one.steps, one.bands] for one in self.lineage(last_step)]

    def lineage(self, last_step: int) -> list[Mechanism]:
        """Return everything that the weights depend on after `last_step` steps."""
        return [*(Mechanism(*numbers) for numbers in self.earlier), self.mechanism(last_step)]

    def write(self, folder: Path, global_step: int) -> None:
        """Write the state into a checkpoint folder, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"version": _VERSION, **asdict(replace(self, global_step=global_step))}
        temporary = folder / f".{STATE_FILE}.{os.getpid()}"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / STATE_FILE)

    @staticmethod
    def read(folder: str | Path) -> RunState:
        """Return the state of a checkpoint.

        Raises:
            CheckpointError: if there is none, or it is damaged: without it nobody knows what was released.
        """
        file = Path(folder) / STATE_FILE
        try:
            content = parse_json(file.read_text(encoding="utf-8"))
            version = content.pop("version")
            if version != _VERSION:
                raise ValueError(f"written by another version ({version}) of hfnoise")
            reasons = [wrong_type(RunState, name, value, texts=False) for name, value in content.items()]
            if any(reasons):
                raise ValueError(" ".join(filter(None, reasons)))
            state = RunState(**content)
            state.lineage(state.global_step)  # raises for numbers that are no mechanism
            return state
        except FileNotFoundError:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} holds no {STATE_FILE}: it was not written by a private Trainer, so "
                "nobody knows what its training released of the data. To start from its weights as public ones, pass "
                "the folder as the model and do not resume."
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{str(file)!r} is damaged ({error}): without it the noise cannot be replayed and epsilon is not "
                "known. Use an older checkpoint."
            ) from None

    def refuse_other_mechanism(self, here: RunState, folder: str) -> None:
        """Raise ValueError if `here` is not the mechanism of this checkpoint."""
        differing = [name for name in _MECHANISM if getattr(self, name) != getattr(here, name)]
        if differing:
            listed = ", ".join(
                f"{name}: {getattr(self, name)!r} there, {getattr(here, name)!r} here" for name in differing
            )
            raise CheckpointError(
                f"checkpoint {folder!r} belongs to another private run ({listed}): its epsilon would be that of "
                "neither. Resume with the dataset and settings it was written with, or start a new run in another "
                "output_dir."
            )


class PrivateRun:
    """A run in progress: the draws, the ledger, and how many steps the budget allows.

    Args:
        state ([`RunState`]): what it is.
        secret (`bytes`): 32 bytes.
        ledger ([`Ledger`], *optional*): of the main process; other processes have none.
        limit (`int`): the step after which the budget is spent; the planned steps if there is no budget.
    """

    def __init__(self, state: RunState, secret: bytes, ledger: Ledger | None, limit: int) -> None:
        self.state, self.ledger, self.limit = state, ledger, limit
        self._charged = max(state.first_step, state.global_step)
        # A known seed gives every run the same draws: that is what tests want of it.
        public = state.secret.startswith(UNSAFE)
        self.random = KeyedRandom(run_key(secret, UNSAFE if public else state.run_id))

    def charge(self, last_step: int) -> None:
        """Write into the ledger that steps up to `last_step` are released; on the disk before this returns.

        Raises:
            RuntimeError: for a step beyond the budget, whatever became of the callback that stops before it.
        """
        if last_step > self.limit:
            raise RuntimeError(
                f"step {last_step} exceeds the budget target_epsilon={self.state.target_epsilon}, which allows "
                f"{self.limit} steps; nothing of it is released."
            )
        self._charged = max(self._charged, last_step)
        if self.ledger is None:
            return
        state = self.state
        self.ledger.charge(
            LedgerEntry(
                run_id=state.run_id,
                sample_rate=state.sample_rate,
                noise_multiplier=state.noise_multiplier,
                bands=state.bands,
                unit=state.unit,
                first_step=state.first_step,
                steps=last_step - state.first_step,
                started=state.started,
                secret=state.secret,
            )
        )

    def released(self) -> list[list[Any]]:
        """Return everything that the weights in memory may depend on, a step that was interrupted included."""
        return self.state.released(self._charged)

    def epsilon(self, last_step: int) -> float:
        """Return epsilon of the weights after `last_step` steps: of this run and of those that it branched off."""
        return _composed(tuple(self.state.lineage(last_step)), self.state.delta, self.state.accountant)

    def total_epsilon(self, last_step: int) -> float:
        """Return epsilon of everything on the ledger of the dataset, this run up to `last_step` included."""
        others = [] if self.ledger is None else self.ledger.mechanisms(without=self.state.run_id)
        return _composed((*others, self.state.mechanism(last_step)), self.state.delta, self.state.accountant)


@lru_cache(maxsize=64)  # a composition takes up to a second, and log, report and card of a checkpoint ask for the same
def _composed(mechanisms: tuple[Mechanism | Search, ...], delta: float, accountant: str) -> float:
    return composed_epsilon(mechanisms, delta, accountant)


def plan_run(
    state: RunState, ledger: Ledger, noise_multiplier: float | None, at_step: int = 0
) -> tuple[RunState, int]:
    """Return the state with its noise multiplier and the last step that the budget allows; main process only.

    Args:
        state ([`RunState`]): the run; its `noise_multiplier` is still open.
        ledger ([`Ledger`]): of the dataset.
        noise_multiplier (`float`, *optional*): `None` to calibrate it to the budget.
        at_step (`int`, defaults to `0`): where the training goes on.

    Raises:
        ValueError: if the budget is spent, or belongs to other units.
    """
    refuse_other_units(state, ledger)
    others = ledger.mechanisms(without=state.run_id)
    _tell_what_is_spent(state, others, ledger)
    if noise_multiplier is None:
        assert state.target_epsilon is not None
        noise_multiplier = calibrate_noise_multiplier(
            state.target_epsilon,
            state.delta,
            state.sample_rate,
            state.planned_steps - state.first_step,
            bands=state.bands,
            spent=tuple(others),
            accountant=state.accountant,
        )
    state = replace(state, noise_multiplier=float(noise_multiplier))
    if state.target_epsilon is None:
        return state, state.planned_steps
    planned = composed_epsilon([*others, state.mechanism(state.planned_steps)], state.delta, state.accountant)
    if planned <= state.target_epsilon:
        return state, state.planned_steps
    allowed = state.first_step + largest_step_count(
        state.target_epsilon, state.delta, state.mechanism(state.planned_steps), spent=tuple(others),
        accountant=state.accountant,
    )  # fmt: skip
    if allowed <= at_step:
        raise ValueError(
            f"target_epsilon={state.target_epsilon:g} is spent: no step after step {at_step} fits. The ledger is "
            f"{str(ledger.path)!r}. Take the weights as they are, or raise target_epsilon to what you accept in all."
        )
    return state, allowed


def refuse_other_units(state: RunState, ledger: Ledger) -> None:
    """Raise ValueError if earlier runs on the ledger protect other units, so that their epsilon is not that of a unit.

    What protects all rows of a user protects each of them; it does not hold the other way round.
    """
    if state.unit in ROW_UNITS:
        return
    others = sorted({entry.unit for entry in ledger.entries() if entry.run_id != state.run_id} - {state.unit})
    if others:
        raise ValueError(
            f"the ledger {str(ledger.path)!r} holds runs on this dataset that protect another unit ({others[0]}), and "
            f"this one protects {state.unit}: what those have released of one such unit is not known, so no epsilon "
            "holds for both. Protect the same unit in all runs; or, if nothing of the earlier ones was or will be "
            "used, name another ledger_file."
        )


def _tell_what_is_spent(state: RunState, others: Sequence[Any], ledger: Ledger) -> None:
    """Log what earlier runs have used of the budget; refuse if next to nothing is left."""
    if not others or state.target_epsilon is None:
        return
    spent = composed_epsilon(others, state.delta, state.accountant)
    if spent > SPENT * state.target_epsilon:
        raise ValueError(
            f"target_epsilon={state.target_epsilon:g} is spent: {_runs(others)} "
            f"released epsilon={spent:.4g} (ledger {str(ledger.path)!r}). The budget covers all of them together. "
            "Raise target_epsilon to what you accept in all; or, if nothing of the earlier runs was or will be used, "
            "name another ledger_file."
        )
    logger.warning(
        "%s used epsilon=%.4g of target_epsilon=%g: this run is calibrated to the rest.",
        _runs(others), spent, state.target_epsilon,
    )  # fmt: skip


def _runs(others: Sequence[Any]) -> str:
    return (
        "1 earlier run on this dataset has" if len(others) == 1 else f"{len(others)} earlier runs on this dataset have"
    )


def now() -> str:
    """Return the time, for the ledger."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_run_id() -> str:
    """Return a name that no other run has."""
    return uuid.uuid4().hex
