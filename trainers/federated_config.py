"""Configuration of a federation; validated in `__post_init__`, since YAML goes past a command line's choices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hfnoise.option_types import check_option_types
from hfnoise.options import FEDSVD_OPTIONS
from hfnoise.trainers.noise_dpo_config import option_field

_CHOICES = {
    "aggregation": ("fedsvd", "ffa", "fedavg", "flora", "fedex"),
    "subspace": ("fixed", "refresh"),
    "init_lora_A": ("orthonormal", "kaiming", "w0_svd", "keep"),
    "weighting": ("examples", "uniform"),
}
TRAINS_ONLY_B = ("fedsvd", "ffa")


def _field(name: str, default: Any) -> Any:
    return option_field(name, default, FEDSVD_OPTIONS)


@dataclass
class FedSVDConfig:
    """How clients train one LoRA adapter together; what each of them keeps private stands in its `DPConfig`.

    Args:
        aggregation (`str`, defaults to `"fedsvd"`): `"fedsvd"` (arXiv 2505.12805), or to compare with `"ffa"`
            (FFA-LoRA), `"fedavg"`, `"flora"`, `"fedex"`; see [`~hfnoise.privacy.aggregate_lora`].
        subspace (`str`, defaults to `"fixed"`): `"fixed"` as published: the rows of A span the same space for ever; or
            `"refresh"`, our extension, which folds weak directions away and draws new ones every `refresh_every`
            rounds.
        refresh_every (`int`, defaults to `10`): rounds between two refreshes.
        refresh_directions (`int`, *optional*): how many directions are replaced; all by default.
        init_lora_A (`str`, defaults to `"orthonormal"`): rows to start from: `"orthonormal"`, `"kaiming"` (PEFT's),
            `"w0_svd"` (top right singular vectors of the base weight), or `"keep"`, those of the adapter given.
        rounds (`int`, defaults to `100`): of the federation.
        clients_per_round (`int`, *optional*): drawn anew for every round; all by default.
        local_steps (`int`, defaults to `10`): optimizer steps of a client in a round.
        max_participations (`int`, *optional*): rounds that a client takes part in at most. Its noise is calibrated to
            this number, and it refuses more. By default ceil(rounds x clients_per_round / clients).
        weighting (`str`, defaults to `"examples"`): average by the clients' numbers of examples, which become known
            to the server; `"uniform"` hides them.
        federation_seed (`int`, defaults to `0`): of the first rows and of the choice of clients; public.

    Raises:
        ValueError: for a value out of range, or of a choice that does not exist.

    Example:
        >>> from hfnoise import FedSVDConfig
        >>> FedSVDConfig(rounds=20, clients_per_round=3).participations(clients=6)
        10
    """

    aggregation: str = _field("aggregation", "fedsvd")
    subspace: str = _field("subspace", "fixed")
    refresh_every: int = _field("refresh_every", 10)
    refresh_directions: int | None = _field("refresh_directions", None)
    init_lora_A: str = _field("init_lora_A", "orthonormal")
    rounds: int = _field("rounds", 100)
    clients_per_round: int | None = _field("clients_per_round", None)
    local_steps: int = _field("local_steps", 10)
    max_participations: int | None = _field("max_participations", None)
    weighting: str = _field("weighting", "examples")
    federation_seed: int = _field("federation_seed", 0)

    def __post_init__(self) -> None:
        check_option_types(self, FedSVDConfig)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("refresh_every", "rounds", "local_steps"):
            setattr(self, name, _count(name, getattr(self, name)))
        for name in ("refresh_directions", "clients_per_round", "max_participations"):
            if getattr(self, name) is not None:
                setattr(self, name, _count(name, getattr(self, name)))
        if self.subspace == "refresh" and self.aggregation != "fedsvd":
            raise ValueError(
                f"subspace='refresh' replaces directions of aggregation='fedsvd'; {self.aggregation!r} has no order "
                "of directions. Leave one of the two out."
            )
        if self.refresh_directions is not None and self.subspace == "fixed":
            raise ValueError("refresh_directions is read by subspace='refresh' only.")

    def participations(self, clients: int) -> int:
        """Return how many rounds a client may take part in, among so many clients."""
        if self.max_participations is not None:
            return self.max_participations
        return math.ceil(self.rounds * self.sampled(clients) / clients)

    def sampled(self, clients: int) -> int:
        """Return how many of so many clients take part in a round.

        Raises:
            ValueError: if there are fewer than `clients_per_round`.
        """
        if self.clients_per_round is not None and self.clients_per_round > clients:
            raise ValueError(f"clients_per_round={self.clients_per_round} of only {clients} clients.")
        return clients if self.clients_per_round is None else self.clients_per_round


def _count(name: str, value: Any) -> int:
    try:
        number = int(value)
        if isinstance(value, bool) or number != float(value) or number < 1:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.") from None
    return number
