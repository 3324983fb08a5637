"""The privacy ledger: what has been released of which dataset, over all runs, in one small file.

The guarantee of a dataset is that of everything released of it. A run writes down its steps BEFORE it releases what
they made (a checkpoint, a model); a crash between the two then overstates what was released, and never understates it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hfnoise.privacy.accounting import Mechanism, Search, composed_epsilon
from hfnoise.strict_json import parse_json

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

FORMAT = "hfnoise privacy ledger"
FORMAT_VERSION = 1


class LedgerError(ValueError):
    """A ledger file that cannot be read as one: without it, what was spent is unknown."""


@dataclass(frozen=True)
class LedgerEntry:
    """What one run has released, from its step `first_step` on.

    Args:
        run_id (`str`): names the run; a resumed run keeps it.
        sample_rate (`float`): as in [`Mechanism`].
        noise_multiplier (`float`): as in [`Mechanism`].
        steps (`int`): how many steps have been released, counted from `first_step`.
        bands (`int`, defaults to 1): as in [`Mechanism`].
        unit (`str`, defaults to `"row"`): what is added or removed, in words; the Trainers write "row", "preference
            pair" or "all rows with one value of" a column. "example", which earlier versions wrote, is read as "row".
        first_step (`int`, defaults to 0): above 0 where an earlier part of the run is charged under another name, as
            after a lost secret, when steps are made again with fresh noise.
        started (`str`, defaults to `""`): ISO 8601 time.
        secret (`str`, defaults to `""`): name of the secret that the noise followed from, which tells nothing about
            it ([`~hfnoise.privacy.secret_file.secret_name`]), or "unsafe_seed N".
        expected_trials (`float`, defaults to 0.0): for a whole search over such runs the mean of their secret number;
            0 for a single run.
        eta (`float`, defaults to 0.0), distribution (`str`, defaults to `""`): of a search, as in [`Search`].

    Example:
        >>> from hfnoise.privacy.ledger import LedgerEntry
        >>> LedgerEntry("monday", sample_rate=0.01, noise_multiplier=1.0, steps=300).mechanism.rounds
        300
    """

    run_id: str
    sample_rate: float
    noise_multiplier: float
    steps: int
    bands: int = 1
    unit: str = "row"
    first_step: int = 0
    started: str = ""
    secret: str = ""
    expected_trials: float = 0.0
    eta: float = 0.0
    distribution: str = ""

    def __post_init__(self) -> None:
        if self.unit == "example":
            object.__setattr__(self, "unit", "row")
        for name in ("run_id", "unit", "started", "secret"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(
                    f"{name}={getattr(self, name)!r} is a {type(getattr(self, name)).__name__}; give a string."
                )
        if not self.run_id or not self.unit:
            raise ValueError("a ledger entry needs a run_id and a unit; without them what was spent has no meaning.")
        if isinstance(self.first_step, bool) or not isinstance(self.first_step, int) or self.first_step < 0:
            raise ValueError(f"first_step={self.first_step!r} must be an integer of at least 0.")
        self.mechanism  # noqa: B018 - it checks the other fields

    @property
    def mechanism(self) -> Mechanism | Search:
        """What the accountant sees of the entry."""
        one = Mechanism(self.sample_rate, self.noise_multiplier, self.steps, self.bands)
        if self.expected_trials == 0:
            return one
        return Search(one, self.expected_trials, self.eta, self.distribution)


class Ledger:
    """The entries of one dataset in a ledger file; every call reads the file anew, since other runs write to it.

    Formal guarantee: as long as all runs on the units charge the same file before they release anything, `epsilon` is
    that of adaptive composition of all of them. The ledger cannot see copies of the data under other contents (one row
    more gives another fingerprint), nor a file that was deleted: keep it beside the data, not in an output folder.

    The file is JSON, readable by its owner only, replaced as a whole (written aside, flushed to disk, renamed) under a
    lock of the operating system, so that runs at the same time lose nothing and a crash leaves the old or the new one.

    Args:
        path (`str` or `Path`): the file; made with its folder at the first charge.
        fingerprint (`str`): of the dataset, see `dataset_fingerprint`; one file may hold several datasets.

    Raises:
        LedgerError: on a system without locks.
        ValueError: for a fingerprint that names no dataset.

    Example:
        >>> from hfnoise.privacy.ledger import Ledger, LedgerEntry
        >>> ledger = Ledger("ledger.json", fingerprint="of the dataset")
        >>> ledger.charge(LedgerEntry("monday", sample_rate=0.05, noise_multiplier=3.0, steps=300))
        >>> f"{ledger.epsilon(delta=1e-5):.3f}"
        '1.159'
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str) -> None:
        if not isinstance(fingerprint, str) or not fingerprint:
            raise ValueError(f"fingerprint={fingerprint!r} names no dataset; give the string of dataset_fingerprint.")
        if fcntl is None:
            raise LedgerError(
                "this system has no flock (the module fcntl), with which a ledger is locked: of two runs at once one "
                "could overwrite what the other has charged, and the stated epsilon would be too small. Use Linux, "
                "macOS, or the Linux subsystem of Windows."
            )
        self.path = Path(path)
        self.fingerprint = fingerprint

    def entries(self) -> list[LedgerEntry]:
        """Return what was charged for this dataset, oldest first; a file that does not exist yet holds nothing.

        Raises:
            LedgerError: if the file is damaged, or of a newer format.
        """
        return self._read()[1]

    def charge(self, entry: LedgerEntry) -> None:
        """Write down what a run releases, before it is released; charging the same again changes nothing.

        The entry of the same `run_id` keeps the larger number of steps: steps replayed after a resume, with the same
        secret, are the same release.

        Raises:
            ValueError: if the run has been charged with another mechanism, unit or first step.
            LedgerError: if the file is damaged; it is left as it was.
            OSError: if it cannot be written; then nothing must be released.
        """
        with self._locked():
            datasets, entries = self._read()
            for at, old in enumerate(entries):
                if old.run_id == entry.run_id:
                    if entry.steps <= old.steps and replace(entry, steps=old.steps) == old:
                        return
                    entries[at] = _merged(old, entry)
                    break
            else:
                entries.append(entry)
            datasets[self.fingerprint] = [vars(one) for one in entries]
            self._write(datasets)

    def mechanisms(self, without: str | None = None) -> list[Mechanism | Search]:
        """Return what was released of this dataset, but for the run `without`: `spent=` of the calibration."""
        return [entry.mechanism for entry in self.entries() if entry.run_id != without]

    def epsilon(self, delta: float, accountant: str = "pld") -> float:
        """Return the epsilon of everything that was charged for this dataset; see [`composed_epsilon`]."""
        return composed_epsilon(self.mechanisms(), delta, accountant)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A file of its own, never removed: the ledger itself is replaced, and a lock stays with the old file.
        lock, flags = self.path.with_name(f"{self.path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            descriptor = os.open(lock, flags, 0o600)
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, flags, 0o600)
        assert fcntl is not None  # or there were no ledger
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _read(self) -> tuple[dict[str, Any], list[LedgerEntry]]:
        """Return all datasets of the file as they stand there, and the entries of this one."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}, []
        except UnicodeDecodeError as error:
            raise self._damaged(str(error)) from None
        try:
            content = parse_json(text)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            if content["version"] != FORMAT_VERSION:
                raise ValueError(f"its version is {content['version']!r}, and this hfnoise reads {FORMAT_VERSION}")
            datasets = dict(content["datasets"].items())
            return datasets, [LedgerEntry(**entry) for entry in datasets.get(self.fingerprint, [])]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from None

    def _damaged(self, reason: str) -> LedgerError:
        return LedgerError(
            f"the privacy ledger {str(self.path)!r} cannot be read ({reason}). What was released of the data is then "
            "unknown and no epsilon can be stated; restore the file from a backup. Do not start an empty one: the "
            "guarantee would leave out the earlier runs."
        )

    def _write(self, datasets: dict[str, Any]) -> None:
        # One line for each entry: quicker than json's indentation, and good to read in a diff.
        shown = [
            f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, entries)) + "\n]"
            for name, entries in datasets.items()
        ]
        head = f'{{"format": {json.dumps(FORMAT)}, "version": {FORMAT_VERSION}, "datasets": {{\n'
        text = head + ",\n".join(shown) + "\n}}\n"
        # mkstemp makes it readable by its owner only.
        descriptor, aside = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.", suffix=".new")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


def _merged(old: LedgerEntry, new: LedgerEntry) -> LedgerEntry:
    """Return the entry of a run that is charged again, with the larger number of steps."""
    changed = [
        f"{field.name} ({getattr(old, field.name)!r} in the ledger, {getattr(new, field.name)!r} now)"
        for field in fields(LedgerEntry)
        if field.name != "steps" and getattr(old, field.name) != getattr(new, field.name)
    ]
    if changed:
        raise ValueError(
            f"run {new.run_id!r} was charged with another {', another '.join(changed)}; one entry cannot stand for "
            "both, and the epsilon would be wrong. Continue the run as it was started, or give it a run_id of its own."
        )
    return replace(old, steps=max(old.steps, new.steps))
