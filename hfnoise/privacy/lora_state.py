"""What server and clients of FedSVD hold of a layer.

The rows of A never leave their space, A_i = R_i^T Q. Q is fixed at the start and known to all (sent once, or drawn
from a shared seed), so a round needs the averaged, rotated B and the rotation R_i only. A client does not decompose
anything: in a degenerate subspace another LAPACK would give it other rows than the server's B is meant for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfnoise.privacy.lora_export import export_factors
from hfnoise.privacy.lora_factors import LoraA, LoraB, LoraFactors, check_factors, check_finite
from hfnoise.privacy.lora_message import RotationMessage, StaleRotationError, rotation_digest, verify_rotation
from hfnoise.privacy.lora_refresh import replace_weakest
from hfnoise.privacy.lora_rotation import ORTHONORMAL_TOLERANCE, gram_rotation, orthonormal_rows, orthonormality_error

# A float32 rotation is orthogonal to 1e-7; what is off by more than this is none.
_NOT_A_ROTATION = 1e-5


class LoraRotation:
    """A layer as server and clients of FedSVD hold it: rows Q, rotation R, factor B, and what was folded away.

    Invariant: `lora_A` is R^T Q with Q of orthonormal rows, R orthogonal; both sides form it from the same numbers, R
    as it is sent. On the server, [`advance`] takes the average of a round; on a client, [`receive`] takes the message.
    Rank, names and dtype do not change.

    Formal guarantee: none of its own. It handles released factors and never sees data.

    Args:
        layer (`str`): name, such as the path of the module.
        lora_A (`torch.Tensor` of shape `(rank, inputs)`, float32 or float64): rows to start from; made orthonormal
            (LQ, with B multiplied to keep B A) unless they are. A client gives the server's [`basis_rows`], or what
            the same seed gives.
        lora_B (`torch.Tensor` of shape `(outputs, rank)`, same dtype): to start from, usually zeros.

    Raises:
        TypeError, ValueError: for factors that [`rotate_lora`] refuses.

    Example:
        >>> import torch
        >>> from hfnoise.privacy import LoraRotation
        >>> server = LoraRotation("q_proj", torch.eye(2, 3), torch.zeros(4, 2))
        >>> client = LoraRotation("q_proj", server.basis_rows, torch.zeros(4, 2))
        >>> message = server.advance(torch.arange(8.0).reshape(4, 2))
        >>> lora_A, lora_B = client.receive(message)
        >>> torch.equal(lora_A, server.lora_A), message.floats
        (True, 12)
    """

    def __init__(self, layer: str, lora_A: LoraA, lora_B: LoraB) -> None:
        check_factors(lora_A, lora_B, f"lora_A and lora_B of {layer!r}")
        check_finite(lora_A, f"lora_A of {layer!r}")
        check_finite(lora_B, f"lora_B of {layer!r}")
        self.layer, self.round, self.basis = layer, 0, 0
        self.folded: list[LoraFactors] = []
        rows, columns = lora_A.detach().clone(), lora_B.detach().clone()
        if orthonormality_error(rows) > ORTHONORMAL_TOLERANCE:
            exact, triangle = orthonormal_rows(rows)
            rows, columns = exact.to(rows), (columns.double() @ triangle).to(columns)
        # As sent: rounded, so that clients hold the same bits.
        self._rows, self._columns = rows, columns
        self._rotation = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
        self._last: RotationMessage | None = None

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self._rows)

    @property
    def basis_rows(self) -> LoraA:
        """Q, `(rank, inputs)`: to be sent to each client once; whoever receives a refresh makes its new rows."""
        return self._rows.clone()

    @property
    def rotation(self) -> Tensor:
        """R as it is sent, `(rank, rank)`, in the dtype of the factors."""
        return self._rotation.to(self._columns.dtype)

    @property
    def lora_A(self) -> LoraA:
        """R^T Q, multiplied in float64."""
        return (self.rotation.double().mT @ self._rows.double()).to(self._rows.dtype)

    @property
    def lora_B(self) -> LoraB:
        """B, `(outputs, rank)`, that belongs to `lora_A`."""
        return self._columns.clone()

    def advance(self, lora_B: LoraB, *, replaced: int = 0, seed: int = 0) -> RotationMessage:
        """Server: take the average of the clients' B, rotate, begin the next round; return its message.

        Args:
            lora_B (`torch.Tensor` of shape `(outputs, rank)`, dtype of the factors): averaged.
            replaced (`int`, defaults to `0`): also refresh (our extension, see [`refresh_lora`]): fold this many of
                the weakest directions and draw others. The message stays of the same size.
            seed (`int`, defaults to `0`): of the new rows; clients draw them from it. Public, and another one each
                time.

        Returns:
            [`RotationMessage`] of the new round.

        Raises:
            TypeError: if the dtype differs.
            ValueError: if the shape differs, values are not finite, or `replaced` is out of range.
        """
        self._check_average(lora_B)
        if isinstance(replaced, bool) or not isinstance(replaced, int) or not 0 <= replaced <= self.rank:
            raise ValueError(f"replaced must be a whole number between 0 and the rank {self.rank}, got {replaced!r}.")
        turn, columns = gram_rotation(lora_B.detach().double())
        self._rotation = self._rotation @ turn
        self._columns = columns.to(self._columns)
        self.round += 1
        message = self._make_message(replaced, seed if replaced else 0)
        self._refresh(message)
        self._last = message
        return message

    def message(self) -> RotationMessage:
        """Server: return the message of the current round again, or of round 0 before the first."""
        if self._last is not None:
            return self._last
        return self._make_message()

    def joining_message(self) -> RotationMessage:
        """Server: return the message of this round for a client that gets [`basis_rows`] with it: nothing to refresh.

        A client that holds the basis before a refresh gets [`message`], which tells it to refresh as well.
        """
        return self._make_message()

    def receive(self, message: RotationMessage, round: int | None = None) -> tuple[LoraA, LoraB]:
        """Client: check a message and return the factors to train on; or raise, and keep what was.

        Args:
            message ([`RotationMessage`]): of the server.
            round (`int`, *optional*): the round that the transport says it is. Default: any after the last received,
                or that one again.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `lora_A`, `lora_B`. After a refresh `folded` has one more entry, to
            be added to the frozen part.

        Raises:
            StaleRotationError: if layer, round, basis or digest are not those expected.
            ValueError: if shapes differ, or B is not finite.
        """
        verify_rotation(message, self.layer, round)
        if self._last is not None and message.digest == self._last.digest:
            return self.lora_A, self.lora_B  # sent again
        if message.round < self.round or (self._last is not None and message.round == self.round):
            raise StaleRotationError(
                f"layer {self.layer!r} holds round {self.round} already, and got another rotation, of round "
                f"{message.round}. Ask the server for its current message."
            )
        if message.basis != self.basis:
            raise StaleRotationError(
                f"layer {self.layer!r} holds basis {self.basis}, and round {message.round} rotates basis "
                f"{message.basis}: this client missed a refresh. Send it the server's state_dict()."
            )
        if tuple(message.rotation.shape) != (self.rank, self.rank):
            raise StaleRotationError(
                f"layer {self.layer!r} has rank {self.rank}, and got a rotation of shape "
                f"{tuple(message.rotation.shape)}: it belongs to another adapter."
            )
        self._check_average(message.lora_B)
        if not orthonormality_error(message.rotation) <= _NOT_A_ROTATION:
            raise StaleRotationError(f"layer {self.layer!r} got a matrix that is not orthogonal as its rotation.")
        self._rotation = message.rotation.detach().double().to(self._rows.device)
        self._columns = message.lora_B.detach().clone()
        self.round = message.round
        self._refresh(message)
        self._last = message
        return self.lora_A, self.lora_B

    def export(self, rank: int | None = None) -> tuple[LoraFactors, float]:
        """Return one pair of factors with all that was folded, see [`export_factors`]."""
        return export_factors(self.lora_A, self.lora_B, self.folded, rank)

    def state_dict(self) -> dict[str, Any]:
        """Return all there is, for a restart of the server or a client that joins late: tensors, numbers, strings."""
        return {
            "layer": self.layer, "round": self.round, "basis": self.basis, "rows": self._rows,
            "lora_B": self._columns, "rotation": self._rotation, "folded": [tuple(part) for part in self.folded],
            "message": None if self._last is None else self._last._asdict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; the rank and dtype may be others, the layer not.

        Raises:
            ValueError: if it is of another layer.
        """
        if state["layer"] != self.layer:
            raise ValueError(f"this is layer {self.layer!r}, and the state is of {state['layer']!r}.")
        self.round, self.basis = int(state["round"]), int(state["basis"])
        self._rows, self._columns = state["rows"].clone(), state["lora_B"].clone()
        self._rotation = state["rotation"].double().clone()
        self.folded = [LoraFactors(*part) for part in state["folded"]]
        self._last = None if state["message"] is None else RotationMessage(**state["message"])

    def _make_message(self, replaced: int = 0, seed: int = 0) -> RotationMessage:
        sent = self.rotation
        digest = rotation_digest(self.layer, self.round, sent, basis=self.basis, replaced=replaced, seed=seed)
        return RotationMessage(self.layer, self.round, self.basis, self.lora_B, sent, digest, replaced, seed)

    def _refresh(self, message: RotationMessage) -> None:
        """Fold and redraw, on both sides from the same numbers; the rotation begins anew."""
        if message.replaced:
            generator = torch.Generator().manual_seed(message.seed)
            rows, columns, folded = replace_weakest(self.lora_A, self._columns, message.replaced, generator=generator)
            # Kept rows are rounded rotations; without this their errors would add up from refresh to refresh.
            exact, triangle = orthonormal_rows(rows)
            self._rows, self._columns = exact.to(rows), (columns.double() @ triangle).to(columns)
            self.folded.append(folded)
            self._rotation = torch.eye(self.rank, dtype=torch.float64, device=rows.device)
            self.basis += 1

    def _check_average(self, lora_B: Tensor) -> None:
        check_factors(self._rows, lora_B, f"lora_A and the average lora_B of {self.layer!r}")
        if lora_B.shape != self._columns.shape:
            raise ValueError(
                f"layer {self.layer!r} has B of shape {tuple(self._columns.shape)}, got {tuple(lora_B.shape)}."
            )
        check_finite(lora_B, f"lora_B of {self.layer!r}")
