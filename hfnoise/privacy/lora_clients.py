"""What the clients of a round hand in, checked before anything is averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfnoise.privacy.lora_factors import LoraFactors, check_factors, check_finite, stack_factors

# Clients form A from the rotation themselves, and their BLAS may round otherwise than the server's.
_SAME_A = 1e-5
_SHOWN = 3


@dataclass(frozen=True)
class LoraClients:
    """The checked factors of one layer; `shares` sum to 1, the clients' factors are float64."""

    server: LoraFactors
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    shares: list[float]
    scalings: list[float]
    server_scaling: float

    @property
    def dtype(self) -> torch.dtype:
        return self.server.lora_A.dtype

    @property
    def have_one_rank(self) -> bool:
        return all(lora_A.shape[0] == self.server.rank for lora_A in self.lora_A)

    def mean(self, factors: list[Tensor]) -> Tensor:
        """Return sum p_k X_k in float64, added up in the order of the clients."""
        total = torch.zeros_like(factors[0])
        for share, factor in zip(self.shares, factors, strict=True):
            total += share * factor
        return total

    def mean_lora_B(self) -> Tensor:
        """Return sum p_k (s_k / s) B_k in float64, with zeros in the columns of the server that a client lacks."""
        total = torch.zeros_like(self.server.lora_B, dtype=torch.float64)
        for share, own_scaling, lora_B in zip(self.shares, self.scalings, self.lora_B, strict=True):
            total[:, : lora_B.shape[1]] += share * (own_scaling / self.server_scaling) * lora_B
        return total

    def stacked(self) -> LoraFactors:
        """Return factors of sum p_k s_k B_k A_k, of rank sum r_k."""
        parts = zip(self.shares, self.scalings, self.lora_A, self.lora_B, strict=True)
        return stack_factors([LoraFactors(a, share * own_scaling * b) for share, own_scaling, a, b in parts])

    def cast(self, factors: LoraFactors) -> LoraFactors:
        """Return factors in the dtype of the server's."""
        return LoraFactors(factors.lora_A.to(self.dtype), factors.lora_B.to(self.dtype))

    def require_one_rank_and_scaling(self, method: str) -> None:
        """Raise ValueError unless factors can be averaged entry by entry."""
        if not self.have_one_rank:
            raise ValueError(
                f"method={method!r} averages factors entry by entry and needs clients of the server's rank "
                f"{self.server.rank}, got ranks {[lora_A.shape[0] for lora_A in self.lora_A]}. Only 'flora' and "
                "'fedsvd' take different ranks: they average products."
            )
        if any(scaling != self.server_scaling for scaling in self.scalings):
            raise ValueError(
                f"method={method!r} averages factors entry by entry and needs one scaling (alpha / r), got "
                f"{self.scalings} and {self.server_scaling} on the server. Give all clients the same, or use 'flora' "
                "or 'fedsvd'."
            )

    def holders_of_other_rows(self) -> list[int]:
        """Return the clients whose A is not the first rows of the server's A."""
        tolerance = _SAME_A * float(self.server.lora_A.abs().max())
        return [
            client
            for client, lora_A in enumerate(self.lora_A)
            if lora_A.shape[0] > self.server.rank
            or not float((lora_A - self.server.lora_A[: lora_A.shape[0]].double()).abs().max()) <= tolerance
        ]

    def require_frozen_A(self, method: str) -> None:
        """Raise ValueError if a client trained A."""
        others = self.holders_of_other_rows()
        if others:
            raise ValueError(
                f"method={method!r} freezes A, and clients {others[:_SHOWN]} give another lora_A than the server's. "
                "Either they trained both A and B (set requires_grad of lora_A to False), or they hold a stale "
                "rotation. Averaging their B with the server's A would be neither's model."
            )


def read_clients(
    method: str,
    lora_A: Tensor,
    lora_B: Tensor,
    client_lora_A: Sequence[Tensor] | Tensor | None,
    client_lora_B: Sequence[Tensor] | Tensor,
    weights: Sequence[float] | Tensor | None,
    scaling: float | Sequence[float],
    server_scaling: float | None,
) -> LoraClients:
    """Return the checked clients of a layer, or raise; see [`aggregate_lora`]."""
    check_factors(lora_A, lora_B, "the server's lora_A and lora_B")
    server = LoraFactors(lora_A.detach(), lora_B.detach())
    check_finite(lora_A, "the server's lora_A")
    check_finite(lora_B, "the server's lora_B")
    columns = list(client_lora_B)
    if not columns:
        raise ValueError("no client handed in anything: keep the server's factors, or wait for clients.")
    if client_lora_A is None:
        rows = _leading_rows(method, server, columns)
    else:
        rows = list(client_lora_A)
    if len(rows) != len(columns):
        raise ValueError(f"client_lora_A has {len(rows)} clients and client_lora_B {len(columns)}; give both of each.")
    for client, (row, column) in enumerate(zip(rows, columns, strict=True)):
        _check_client(client, server, row, column)
    scalings, own = _read_scalings(scaling, len(columns), server_scaling)
    return LoraClients(
        server,
        [row.detach().double() for row in rows],
        [column.detach().double() for column in columns],
        read_shares(weights, len(columns)),
        scalings,
        own,
    )


def _leading_rows(method: str, server: LoraFactors, columns: list[Tensor]) -> list[Tensor]:
    if method not in ("ffa", "fedsvd"):
        raise ValueError(f"client_lora_A=None, but clients of {method!r} train A and must hand it in.")
    ranks = [column.shape[-1] if isinstance(column, Tensor) and column.dim() else 0 for column in columns]
    wider = [client for client, rank in enumerate(ranks) if rank > server.rank]
    if wider:
        raise ValueError(
            f"clients {wider[:_SHOWN]} hand in B of rank {[ranks[client] for client in wider[:_SHOWN]]} without their "
            f"A, and the server has {server.rank} rows only. Give client_lora_A."
        )
    return [server.lora_A[:rank] for rank in ranks]


def _check_client(client: int, server: LoraFactors, lora_A: Tensor, lora_B: Tensor) -> None:
    who = f"client {client}'s"
    check_factors(lora_A, lora_B, f"{who} lora_A and lora_B")
    if (lora_A.shape[1], lora_B.shape[0]) != (server.lora_A.shape[1], server.lora_B.shape[0]):
        raise ValueError(
            f"{who} layer has {lora_A.shape[1]} inputs and {lora_B.shape[0]} outputs, the server's "
            f"{server.lora_A.shape[1]} and {server.lora_B.shape[0]}: it trains another base model or layer."
        )
    check_finite(lora_A, f"{who} lora_A")
    check_finite(lora_B, f"{who} lora_B")


def read_shares(weights: Sequence[float] | Tensor | None, clients: int) -> list[float]:
    """Return p_k = n_k / sum n_k of clients, all alike if they hide n_k.

    Raises:
        ValueError: if there are more or fewer than clients, or one is not positive and finite.

    Example:
        >>> from hfnoise.privacy.lora_clients import read_shares
        >>> read_shares([3, 1], 2), read_shares(None, 2)
        ([0.75, 0.25], [0.5, 0.5])
    """
    if weights is None:
        return [1 / clients] * clients
    try:
        sizes = [] if isinstance(weights, Mapping) else [float(size) for size in weights]
    except (TypeError, ValueError):
        sizes = []
    if not sizes:
        raise ValueError(
            f"weights must be a sequence of numbers n_k, in the order of the {clients} clients, got {weights!r}; or "
            "None, for clients that hide them."
        )
    if len(sizes) != clients:
        raise ValueError(f"weights has {len(sizes)} entries for {clients} clients; give one n_k for each, or None.")
    for client, size in enumerate(sizes):
        if not 0 < size < math.inf:
            raise ValueError(
                f"client {client} has the weight n_k = {size:g}; weights are finite numbers above 0. A client without "
                "examples has trained nothing: leave it out of the round. Clients that hide n_k: weights=None."
            )
    total = math.fsum(sizes)
    return [size / total for size in sizes]


def _read_scalings(
    scaling: float | Sequence[float], clients: int, server_scaling: float | None
) -> tuple[list[float], float]:
    try:
        scalings = [float(scaling)] * clients  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # a list, an array, a tensor
        scalings = [float(each) for each in scaling]  # type: ignore[union-attr]
    if len(scalings) != clients:
        raise ValueError(
            f"scaling has {len(scalings)} entries for {clients} clients; give one number, or one for each."
        )
    if server_scaling is None:
        if len(set(scalings)) > 1:
            raise ValueError(
                f"the clients' scalings (alpha / r) differ: {scalings}. Give server_scaling, that of the server's "
                "layer, in whose units the result is."
            )
        server_scaling = scalings[0]
    for value in (*scalings, server_scaling):
        if not 0 < value < math.inf:
            raise ValueError(f"scaling (alpha / r) must be a finite number above 0, got {value}.")
    return scalings, float(server_scaling)


def scaling_of_layer(scaling: Any, layer: str) -> Any:
    """Return what `scaling` says of a layer: it may be by layer, for all clients or for each of them.

    Raises:
        ValueError: if a dict of scalings lacks the layer.

    Example:
        >>> from hfnoise.privacy.lora_clients import scaling_of_layer
        >>> scaling_of_layer([{"q_proj": 2.0}, {"q_proj": 1.0}], "q_proj"), scaling_of_layer(3.0, "q_proj")
        ([2.0, 1.0], 3.0)
    """
    if isinstance(scaling, Mapping):
        if layer not in scaling:
            raise ValueError(f"scaling is by layer, {sorted(scaling)[:_SHOWN]}, and lacks {layer!r}. Give all layers.")
        return scaling[layer]
    if isinstance(scaling, Sequence) and scaling and all(isinstance(each, Mapping) for each in scaling):
        return [scaling_of_layer(each, layer) for each in scaling]
    return scaling


def same_names(
    lora_A: Mapping[str, Any], lora_B: Any, client_lora_A: Sequence[Any] | None, client_lora_B: Sequence[Any]
) -> None:
    """Raise ValueError unless all have the same layers.

    Example:
        >>> from hfnoise.privacy.lora_clients import same_names
        >>> same_names({"q_proj": 1}, {"q_proj": 2}, None, [{"q_proj": 3}])
    """
    everyone = [("the server's lora_B", lora_B)]
    for what, clients in (("lora_A", client_lora_A), ("lora_B", client_lora_B)):
        everyone += [(f"client {number}'s {what}", client) for number, client in enumerate(clients or [])]
    for who, factors in everyone:
        if not isinstance(factors, Mapping):
            raise TypeError(f"the server's lora_A is a dict by layer, so {who} must be one too, got {type(factors)}.")
        missing, extra = sorted(set(lora_A) - set(factors)), sorted(set(factors) - set(lora_A))
        if missing or extra:
            raise ValueError(
                f"{who} has other layers than the server's lora_A: it lacks {missing[:_SHOWN] or 'none'} "
                f"({len(missing)}) and adds {extra[:_SHOWN] or 'none'} ({len(extra)}). All clients need the same "
                "target_modules."
            )
    if not lora_A:
        raise ValueError("the server's lora_A has no layers.")
    if not client_lora_B:
        raise ValueError("no client handed in anything: keep the server's factors, or wait for clients.")
    if client_lora_A is not None and len(client_lora_A) != len(client_lora_B):
        raise ValueError(f"client_lora_A has {len(client_lora_A)} clients and client_lora_B {len(client_lora_B)}.")
