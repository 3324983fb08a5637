"""The saved coefficients of linear guidance estimates, and the check that they are of this model and schedule."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfnoise.strict_json import parse_json

_FORMAT = 1


class CoefficientMismatchError(ValueError):
    """Coefficients of another model, scheduler, schedule or scale: the estimates would be of another run."""


@dataclass(frozen=True)
class EstimateKey:
    """What linear coefficients were fitted on, and hold for.

    Args:
        model (`str`): a name of the denoiser that changes when its weights do.
        scheduler (`str`): class name.
        num_inference_steps (`int`): T.
        guidance_scale (`float`): w of the runs: it decides where they go.
        sigmas (`str`): [`schedule_digest`] of the noise levels.
    """

    model: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    sigmas: str


def schedule_digest(levels: Sequence[float]) -> str:
    """Return the SHA-256 over the noise levels of a schedule, rounded to float32, as 16 hex digits.

    Args:
        levels (`Sequence[float]`): sigmas, or timesteps where a scheduler has no sigmas, from the first step on.

    Example:
        >>> from hfnoise.guidance import schedule_digest
        >>> schedule_digest([14.6, 1.0, 0.0]) == schedule_digest([14.6, 1.1, 0.0])
        False
    """
    numbers = [float(level) for level in levels]
    return hashlib.sha256(struct.pack(f"<{len(numbers)}f", *numbers)).hexdigest()[:16]


@dataclass(frozen=True)
class LinearCoefficients:
    """Per step the weights of the last updates: delta_t is about sum_i `coefficients[t][i]` delta_(t-1-i).

    Args:
        key ([`EstimateKey`]): what they hold for.
        coefficients (`tuple` of `tuple` of `float`): one row per step, `order` numbers each; 0 where the run has not
            so many steps behind it.
        ridge (`float`): of the fit, for the record.

    Raises:
        ValueError: if the rows are not one per step, of one length, and finite.

    Example:
        >>> from hfnoise.guidance import EstimateKey, LinearCoefficients
        >>> key = EstimateKey("unet", "DDIMScheduler", 2, 7.5, "00")
        >>> LinearCoefficients(key, ((0.0,), (0.9,)), ridge=1e-3).order
        1
    """

    key: EstimateKey
    coefficients: tuple[tuple[float, ...], ...]
    ridge: float

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.coefficients}
        if len(self.coefficients) != self.key.num_inference_steps or len(lengths) != 1 or lengths == {0}:
            raise ValueError(
                f"coefficients must be {self.key.num_inference_steps} rows (one per step) of one length, got "
                f"{len(self.coefficients)} rows of lengths {sorted(lengths)}."
            )
        if not all(math.isfinite(number) for row in self.coefficients for number in row):
            raise ValueError("coefficients must be finite; the updates of the fit were not.")

    @property
    def order(self) -> int:
        """How many updates back the estimate looks."""
        return len(self.coefficients[0])

    def check(self, key: EstimateKey) -> None:
        """Raise unless they are of this run.

        Raises:
            CoefficientMismatchError: naming every part of the key that differs.

        Example:
            >>> from hfnoise.guidance import EstimateKey, LinearCoefficients
            >>> key = EstimateKey("unet", "DDIMScheduler", 1, 7.5, "00")
            >>> LinearCoefficients(key, ((0.0,),), 1e-3).check(EstimateKey("unet", "DDIMScheduler", 1, 4.0, "00"))
            Traceback (most recent call last):
            ...
            hfnoise.guidance.linear_coefficients.CoefficientMismatchError: ...guidance_scale 7.5 (here 4.0)...
        """
        here = asdict(key)
        differing = [
            f"{name} {value!r} (here {here[name]!r})"
            for name, value in asdict(self.key).items()
            if value != here[name]
        ]
        if differing:
            raise CoefficientMismatchError(
                f"these linear coefficients are of another run: {', '.join(differing)}. Fit them again for this one, "
                "or do without: LinearGuidance() holds the last update and needs none."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        rows = [list(row) for row in self.coefficients]
        return {"format": _FORMAT, "key": asdict(self.key), "coefficients": rows, "ridge": self.ridge}

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> LinearCoefficients:
        """Return what [`LinearCoefficients.to_dict`] wrote.

        Raises:
            ValueError: if something is missing, or it was written by a later version.
        """
        if not isinstance(entries, dict):
            raise ValueError(f"these are no linear coefficients of hfnoise: {type(entries).__name__}, not a dict.")
        if entries.get("format") != _FORMAT:
            raise ValueError(f"linear coefficients of format {entries.get('format')!r}; this version reads {_FORMAT}.")
        try:
            key = EstimateKey(**entries["key"])
            rows = tuple(tuple(float(number) for number in row) for row in entries["coefficients"])
            return cls(key, rows, float(entries["ridge"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are no linear coefficients of hfnoise: {error}.") from error

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LinearCoefficients:
        """Read a JSON file of [`LinearCoefficients.save`].

        Raises:
            ValueError: if it is none.
        """
        try:
            entries = parse_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} holds no linear coefficients of hfnoise: {error}.") from error
        return cls.from_dict(entries)
