"""The table of pair losses and the one function that evaluates a loss by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hfnoise.preference import pair_losses
from hfnoise.preference.pair_context import PairContext

__all__ = ["PairContext", "PairLoss", "find_pair_loss", "pair_loss", "pair_loss_names", "register_pair_loss"]

PairFunction = Callable[[Tensor, PairContext], Tensor]


@dataclass(frozen=True)
class PairLoss:
    """A named pair loss: `function(margins, context)` returns the loss per pair."""

    name: str
    function: PairFunction
    reads_flip_rate: bool = False


_PAIR_LOSSES: dict[str, PairLoss] = {
    loss.name: loss
    for loss in (
        PairLoss("sigmoid", pair_losses.sigmoid),
        PairLoss("hinge", pair_losses.hinge),
        PairLoss("exo_pair", pair_losses.exo_pair, reads_flip_rate=True),
        PairLoss("robust", pair_losses.robust, reads_flip_rate=True),
        PairLoss("cdpo", pair_losses.cdpo, reads_flip_rate=True),
        PairLoss("forward_corrected", pair_losses.forward_corrected, reads_flip_rate=True),
        PairLoss("sym", pair_losses.sym),
        PairLoss("ropo", pair_losses.ropo),
        PairLoss("holder", pair_losses.holder),
    )
}
_BUILT_IN = frozenset(_PAIR_LOSSES)
_OPTIONS = frozenset(field.name for field in fields(PairContext)) - {"flip_rate"}


def pair_loss_names() -> tuple[str, ...]:
    """Return the names of all pair losses, built in and registered.

    Example:
        >>> from hfnoise.preference import pair_loss_names
        >>> "forward_corrected" in pair_loss_names()
        True
    """
    return tuple(_PAIR_LOSSES)


def find_pair_loss(name: str) -> PairLoss:
    """Return the pair loss of that name.

    Raises:
        ValueError: if there is none; the message lists the names.
    """
    if name not in _PAIR_LOSSES:
        raise ValueError(
            f"unknown pair loss {name!r}; known are {', '.join(_PAIR_LOSSES)}. "
            "Add your own with hfnoise.register_pair_loss(name, function)."
        )
    return _PAIR_LOSSES[name]


def register_pair_loss(name: str, function: PairFunction, *, reads_flip_rate: bool = False) -> None:
    """Make a pair loss of your own usable by name, in `pair_loss` and in `loss_type` of every NoiseDPOTrainer.

    Args:
        name (`str`): the name; a built-in name is refused, one of your own is replaced.
        function (`Callable`): `function(margins, context)` with margins of shape `(batch,)`, float32 or float64, and a
            [`PairContext`]; returns the loss per pair, shape `(batch,)`.
        reads_flip_rate (`bool`, defaults to `False`): whether it uses `context.flip_rate`; then a run without a rate
            is refused at construction.

    Raises:
        ValueError: if the name is built in or empty.
        TypeError: if the function is not callable.

    Example:
        >>> import torch
        >>> from hfnoise.preference import pair_loss, register_pair_loss
        >>> register_pair_loss("squared_hinge", lambda margins, context: torch.relu(1 - margins) ** 2)
        >>> pair_loss("squared_hinge", torch.tensor([-1.0, 2.0])).tolist()
        [4.0, 0.0]
    """
    if not name or name in _BUILT_IN:
        raise ValueError(f"{name!r} cannot be registered: it is empty or built in ({', '.join(sorted(_BUILT_IN))}).")
    if not callable(function):
        raise TypeError(f"function must be callable as function(margins, context), got {type(function).__name__}.")
    _PAIR_LOSSES[name] = PairLoss(name, function, reads_flip_rate)


def pair_loss(
    name: str, margins: Float[Tensor, " batch"], flip_rate: float | Tensor | None = None, **options: Any
) -> Float[Tensor, " batch"]:
    """Return the loss per pair of a named pair loss.

    Half-precision margins are computed, and the losses returned, in float32; float64 stays float64.

    Args:
        name (`str`): one of `pair_loss_names()`.
        margins (`torch.Tensor` of shape `(batch,)`, floating): beta-scaled margins h, positive where the policy
            agrees with the label.
        flip_rate (`float` or `torch.Tensor` of shape `(batch,)`, *optional*): probability that the label is flipped,
            in [0, 0.5). Required by the losses that read it, ignored by the others.
        **options: fields of [`PairContext`], for instance `holder_gamma=2.0`.

    Returns:
        `torch.Tensor` of shape `(batch,)`: the losses; `robust` may be negative.

    Raises:
        ValueError: for an unknown name or option, a flip rate out of range, or a wrong shape.

    Example:
        >>> import torch
        >>> from hfnoise.preference import pair_loss
        >>> [round(x, 4) for x in pair_loss("robust", torch.tensor([-1.0, 0.0, 1.0]), flip_rate=0.2).tolist()]
        [1.6466, 0.6931, -0.0201]
    """
    loss = find_pair_loss(name)
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} of a pair loss; known are {', '.join(sorted(_OPTIONS))}.")
    if margins.dim() != 1 or not margins.is_floating_point():
        raise ValueError(
            f"margins must be a floating tensor of shape (batch,), got {margins.dtype}, {tuple(margins.shape)}."
        )
    if flip_rate is not None:
        check_flip_rate(flip_rate, count=margins.numel())
        if isinstance(flip_rate, Tensor):
            flip_rate = flip_rate.to(margins.device)
    if margins.dtype in (torch.float16, torch.bfloat16):
        margins = margins.float()  # exp and log of half-precision margins lose the tail that decides a flip
    return loss.function(margins, PairContext(flip_rate=flip_rate, **options))


def check_flip_rate(flip_rate: float | Tensor, count: int | None = None, name: str = "flip_rate") -> None:
    """Raise ValueError unless every flip rate lies in [0, 0.5), so not NaN, and a tensor has `count` elements.

    The message calls the option `name`.
    """
    rates = torch.as_tensor(flip_rate, dtype=torch.float64).detach()
    if rates.dim() > 1 or (rates.dim() == 1 and count is not None and rates.numel() != count):
        raise ValueError(
            f"{name} must be one number or one per pair, shape ({count},), got shape {tuple(rates.shape)}."
        )
    valid = (rates >= 0) & (rates < 0.5)
    if not bool(valid.all()):
        first = rates[~valid].flatten()[0].item()
        raise ValueError(
            f"{name} must be in [0, 0.5), got {first:g}: at one half the labels carry no information, and above it "
            "they are flipped more often than not (then swap chosen and rejected and use 1 - flip_rate)."
        )
