"""The bit schedule of quantisation-aware training: which widths, in which order, for how many of the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from hfnoise.quantization.grids import grid_for

_FORM = "write widths and shares in order, such as '8:0.25,4:0.25,1:0.5'; '4/8:0.5' is weights/activations"


class BitPhase(NamedTuple):
    """A stretch of training at one width: bits of weights and of activations, and its share of all steps.

    As written in a schedule `activation_bits` may be `None`: not said.
    """

    weight_bits: float
    activation_bits: float | None
    share: float


def to_bits(value: Any, name: str) -> float:
    """Return a bit width as a number, an int where it is whole; strings come from YAML and command lines.

    Raises:
        ValueError: if it is none of the widths.

    Example:
        >>> from hfnoise.trainers.qat_schedule import to_bits
        >>> to_bits("1.58", "bits"), to_bits(4.0, "bits")
        (1.58, 4)
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
        bits = int(number) if number.is_integer() else number
        grid_for(bits)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r}; allowed are 1, 1.58 (ternary) and 2 to 8.") from None
    return bits


def parse_bit_schedule(given: Any) -> tuple[BitPhase, ...]:
    """Return the phases of a schedule as it is written.

    Args:
        given (`str`, `Mapping` or `Sequence`): `"8:0.25,4:0.25,1:0.5"`, `{8: 0.25, 4: 0.25, 1: 0.5}`, or
            `[[8, 0.25], [4, 0.25], [1, 0.5]]`; a width may be `"4/8"`, weights and activations.

    Raises:
        ValueError: for another form, an unknown width, shares that are not above 0 or do not sum to 1.

    Example:
        >>> from hfnoise.trainers.qat_schedule import parse_bit_schedule
        >>> parse_bit_schedule("8:0.5,1/4:0.5")[1]
        BitPhase(weight_bits=1, activation_bits=4, share=0.5)
    """
    if isinstance(given, str):
        pairs: list[Any] = [part.split(":") for part in given.split(",")]
    elif isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, Sequence):
        pairs = list(given)
    else:
        raise ValueError(f"bit_schedule is {given!r}; {_FORM}.")
    phases = []
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"bit_schedule has the entry {pair!r}; {_FORM}.")
        weights, slash, activations = str(pair[0]).strip().partition("/")
        bits = to_bits(weights, "a width of bit_schedule")
        of_activations = to_bits(activations, "a width of bit_schedule") if slash else None
        phases.append(BitPhase(bits, of_activations, _share(pair[1])))
    total = math.fsum(phase.share for phase in phases)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ValueError(f"the shares of bit_schedule sum to {total:g}; they are shares of all steps and sum to 1.")
    return tuple(phases)


def _share(value: Any) -> float:
    try:
        share = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(f"bit_schedule has the share {value!r}; shares are above 0 and at most 1.")
    return share


def schedule_text(phases: Sequence[BitPhase]) -> str:
    """Return a schedule as one string, which [`parse_bit_schedule`] reads.

    Example:
        >>> from hfnoise.trainers.qat_schedule import parse_bit_schedule, schedule_text
        >>> schedule_text(parse_bit_schedule({8: 0.25, "4/8": 0.75}))
        '8:0.25,4/8:0.75'
    """
    return ",".join(
        f"{phase.weight_bits}{'' if phase.activation_bits is None else f'/{phase.activation_bits}'}:{phase.share:.12g}"
        for phase in phases
    )


class BitSchedule:
    """A schedule of a run: the widths of each step, a function of the step alone, so that all ranks and a resumed run
    agree.

    A width that is written alone is that of the weights; activations have it too, but never less than at the end
    (8, 4, 1 towards 1-bit weights and 8-bit activations keeps activations at 8), and none if they are not quantised.

    Args:
        phases (`Sequence[BitPhase]`): from [`parse_bit_schedule`].
        weight_bits (`float`), activation_bits (`float`, *optional*): of the result.

    Raises:
        ValueError: if the last phase is not at the bits of the result, or activations are given bits where they are
            not quantised.

    Example:
        >>> from hfnoise.trainers.qat_schedule import BitSchedule, parse_bit_schedule
        >>> schedule = BitSchedule(parse_bit_schedule("8:0.5,1:0.5"), 1, 1)
        >>> [schedule.at(step, max_steps=4) for step in range(4)]
        [(8, 8), (8, 8), (1, 1), (1, 1)]
    """

    def __init__(self, phases: Sequence[BitPhase], weight_bits: float, activation_bits: float | None) -> None:
        self.text = schedule_text(phases)
        self.phases = tuple(self._resolved(phase, activation_bits) for phase in phases)
        last = phases[-1]
        said = activation_bits if last.activation_bits is None else last.activation_bits
        if (last.weight_bits, said) != (weight_bits, activation_bits):
            raise ValueError(
                f"bit_schedule {self.text!r} ends with {last.weight_bits} bits for weights, {said} for activations; "
                f"the result is to have {weight_bits} and {activation_bits}. End the schedule with those."
            )
        self.phases = (*self.phases[:-1], BitPhase(weight_bits, activation_bits, last.share))

    def _resolved(self, phase: BitPhase, activation_bits: float | None) -> BitPhase:
        if activation_bits is None:
            if phase.activation_bits is not None:
                raise ValueError(
                    f"bit_schedule {self.text!r} gives bits to activations, which are not quantised: leave '/' out, "
                    "or set activation_bits."
                )
            return phase
        if phase.activation_bits is not None:
            return phase
        return phase._replace(activation_bits=max(phase.weight_bits, activation_bits))

    def starts(self, max_steps: int) -> list[int]:
        """Return the step, counted from 0, at which each phase begins.

        Raises:
            ValueError: if a phase would have no step.
        """
        ends = [round(max_steps * share) for share in accumulate(phase.share for phase in self.phases)]
        starts = [0, *ends[:-1]]
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            raise ValueError(
                f"bit_schedule {self.text!r} leaves a phase without a step in {max_steps} steps. Train longer, or "
                "leave that phase out."
            )
        return starts

    def at(self, step: int, max_steps: int) -> tuple[float, float | None]:
        """Return bits of weights and activations in the step after `step` steps are done."""
        starts = self.starts(max_steps)
        phase = next(p for p, start in zip(self.phases[::-1], starts[::-1], strict=True) if step >= start)
        return phase.weight_bits, phase.activation_bits
