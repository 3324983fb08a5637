"""A client of a federation: it checks the server's message, trains on its own data, and sends factors back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfnoise.option_types import wrong_type
from hfnoise.privacy.lora_factors import LoraFactors
from hfnoise.privacy.lora_message import StaleRotationError
from hfnoise.privacy.lora_state import LoraRotation
from hfnoise.strict_json import parse_json
from hfnoise.trainers.federated_config import TRAINS_ONLY_B, FedSVDConfig
from hfnoise.trainers.federated_layers import LoraLayers
from hfnoise.trainers.federated_local import LocalTraining
from hfnoise.trainers.federated_message import ClientUpdate, FederationMessage
from hfnoise.trainers.federated_start import start_rows
from hfnoise.trainers.private_mixin import in_float32

STATE_FILE = "federated_client.json"
_UNKNOWN_ROUND = -1


class ParticipationError(ValueError):
    """A round beyond the number that a client's noise is calibrated to."""


@dataclass
class ClientRecord:
    """What a client must not forget between rounds, as JSON; nothing in it is secret.

    Args:
        rounds (`list[int]`): in which it began to train; a round that broke off counts.
        noise_multiplier (`float`, *optional*): calibrated when it first took part.
    """

    rounds: list[int] = field(default_factory=list)
    noise_multiplier: float | None = None


class FedSVDClient:
    """One client: a Trainer on its own data, a cap on its rounds, and its side of the rotation.

    Any Trainer will do, private ones (`DPSFTTrainer`, `make_private(...)`) as well as stock ones. Clients of a
    simulation may share one model: `step` puts the server's factors into it before it trains.

    Formal guarantee: with a private Trainer, what the client sends is (epsilon, delta)-differentially private towards
    everybody, the server included, with the epsilon of its own ledger: the noise is added before anything leaves, and
    it takes part in at most `max_participations` rounds, to which the noise is calibrated. Nothing is gained from the
    server's choice of clients, which the server knows. Not covered: the rounds in which it took part, and the number
    of examples; with `weighting="uniform"` it is not sent, and whoever knows the batch size and the noise can still
    estimate it from epsilon.

    Args:
        name (`str`): its name in reports.
        trainer (`transformers.Trainer`): built on a PEFT model and the client's data. `"fedsvd"` and `"ffa"` need a
            model whose factors A are frozen before the Trainer is built, see [`freeze_lora_A`].
        config ([`FedSVDConfig`]): of the federation.
        clients (`int`, defaults to `1`): how many there are, for the default cap.
        state_dir (`str` or `Path`, *optional*): where it remembers its rounds; without it a restart forgets them.
        record (`dict`, *optional*): the same from elsewhere, such as Flower's `Context.state`.

    Raises:
        TypeError, ValueError: for a Trainer, adapter or dataset that cannot take part.
    """

    def __init__(
        self,
        name: str,
        trainer: Any,
        config: FedSVDConfig,
        *,
        clients: int = 1,
        state_dir: str | os.PathLike[str] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(config, FedSVDConfig):
            raise TypeError(f"config must be a FedSVDConfig, got {type(config).__name__}.")
        self.name, self.config = str(name), config
        self.cap = config.participations(clients)
        self._file = None if state_dir is None else Path(state_dir) / STATE_FILE
        self.record = _merged(_read(self._file), ClientRecord(**(record or {})))
        self._training = LocalTraining(trainer, config.local_steps, self.cap, self.record.noise_multiplier)
        self._training.keep_ledger(None if self._file is None else self._file.with_name("ledger.json"))
        self.layers = LoraLayers.of(trainer.model)
        in_float32(trainer.model)  # TRL casts adapters on a quantised base to bfloat16
        self._refuse_trainable_A()
        self._rotations: dict[str, LoraRotation] = {}
        self._lora_A: dict[str, Tensor] = {}
        self._folded: dict[str, list[LoraFactors]] = {}
        self.last_round: int | None = None  # of the last message that was taken in
        self._answered: int | None = None  # of the last that was trained on to the end

    @property
    def trainer(self) -> Any:
        """The local Trainer."""
        return self._training.trainer

    @property
    def participations(self) -> int:
        """Rounds in which it has begun to train."""
        return len(self.record.rounds)

    @property
    def examples(self) -> int:
        """Number of rows, n_k."""
        return self._training.examples

    @property
    def noise_multiplier(self) -> float | None:
        """Of a private client; None without privacy."""
        return self._training.noise_multiplier

    @property
    def is_calibrated(self) -> bool:
        """Whether its noise follows from a budget, and so from its number of examples."""
        return self._training.is_private and self._training.trainer.dp_config.noise_multiplier is None

    @property
    def delta(self) -> float | None:
        """Of a private client, as stated to others: where n_k is hidden, one that does not follow from it."""
        return self._training.delta if self.config.weighting == "examples" else self._training.stated_delta

    def epsilon(self) -> float | None:
        """Return epsilon of everything released of this client's data, from its ledger; None without privacy."""
        return self._training.epsilon()

    def recall(self, participations: int) -> None:
        """Count at least so many rounds: what the server of a resumed federation knows of a client that forgot."""
        unknown = participations - self.participations
        self.record.rounds.extend([_UNKNOWN_ROUND] * max(0, unknown))

    def step(self, message: FederationMessage) -> ClientUpdate:
        """Take part in a round: check the message, train, and return the factors.

        Args:
            message ([`FederationMessage`]): of the server, for this round.

        Raises:
            ParticipationError: if the client has taken part as often as it may; nothing is trained.
            StaleRotationError: for a message of another round or basis, or one that was changed on its way.
            ValueError: for layers, scalings or a base that are not the client's; for a spent budget.
        """
        self._refuse_other_base(message)
        if message.round == self._answered:
            raise StaleRotationError(
                f"client {self.name!r} has answered round {message.round} already: a second answer would be released "
                "and charged in addition. Ask for the next round."
            )
        if self.participations >= self.cap:
            raise ParticipationError(
                f"client {self.name!r} has taken part in {self.participations} rounds, the most that its noise is "
                f"calibrated to (max_participations={self.cap}). One more would exceed its epsilon; leave it out."
            )
        own = self._own_part(self._take(message), message)
        self._training.require_budget()
        self.record.noise_multiplier = self._training.noise_multiplier
        self.record.rounds.append(message.round)
        _write(self._file, self.record)  # before anything is trained: a round that breaks off has released something
        self.layers.fold(self._changes())
        self.layers.write(own)
        self._training.run(message.round)
        self._answered = message.round
        return self._update(message)

    def take(self, message: FederationMessage) -> None:
        """Put the server's factors into the model and train nothing, for an evaluation; raises as `step` does."""
        self._refuse_other_base(message)
        factors = self._take(message)
        self.layers.fold(self._changes())
        self.layers.write(self._own_part(factors, message))

    def _update(self, message: FederationMessage) -> ClientUpdate:
        trained = self.layers.read()
        both = self.config.aggregation not in TRAINS_ONLY_B
        return ClientUpdate(
            client=self.name,
            round=message.round,
            lora_B={name: factors.lora_B for name, factors in trained.items()},
            lora_A={name: factors.lora_A for name, factors in trained.items()} if both else {},
            scalings=self.layers.scalings,
            examples=self.examples if self.config.weighting == "examples" else None,
            participations=self.participations,
            epsilon=self.epsilon(),
            delta=self.delta,
            base=self.layers.fingerprint(),
        )

    def _take(self, message: FederationMessage) -> dict[str, LoraFactors]:
        """Check the message and return the server's factors; a layer that took one takes the same again."""
        if self.last_round is not None and message.round < self.last_round:
            raise StaleRotationError(
                f"client {self.name!r} holds round {self.last_round} already, and got a message of round "
                f"{message.round}. Ask the server for its current message."
            )
        held = max((len(parts) for parts in self._folded.values()), default=0)
        if message.folded_since > held:
            raise StaleRotationError(
                f"client {self.name!r} holds {held} folded updates and got those after {message.folded_since}: it "
                "missed a round. Ask the server for message(since=None)."
            )
        if message.method == "fedsvd":
            factors = self._take_rotations(message)
        else:
            rows = message.lora_A or message.start or self._lora_A
            if not rows:
                rows = start_rows(self.layers, self.config, message.lora_B)
            for name, value in {**rows, **message.lora_B}.items():
                if value.dtype != torch.float32 or not bool(value.isfinite().all()):
                    raise ValueError(f"layer {name!r}: the server's factors must be finite and float32.")
            self._lora_A = dict(rows)
            factors = {name: LoraFactors(rows[name], message.lora_B[name]) for name in message.lora_B}
            # Those after `folded_since` are replaced, not added: the same message may come twice.
            self._folded = {
                name: [*self._folded.get(name, [])[: message.folded_since], *message.folded.get(name, [])]
                for name in message.lora_B
            }
        self.last_round = message.round
        return factors

    def _take_rotations(self, message: FederationMessage) -> dict[str, LoraFactors]:
        rotations = self._rotations
        if message.start or not rotations:
            rows = message.start or start_rows(self.layers, self.config, message.lora_B)
            rotations = {name: LoraRotation(name, rows[name], torch.zeros_like(message.lora_B[name])) for name in rows}
            for name, rotation in rotations.items():
                rotation.basis = message.rotations[name].basis if message.start else 0
        received = {
            name: rotation.receive(message.rotations[name], message.round) for name, rotation in rotations.items()
        }
        for name, parts in message.folded.items():
            rotations[name].folded = [LoraFactors(part.lora_A, part.lora_B / message.scalings[name]) for part in parts]
        self._rotations = rotations
        self._folded = {
            name: [LoraFactors(part.lora_A, part.lora_B * message.scalings[name]) for part in rotation.folded]
            for name, rotation in rotations.items()
            if rotation.folded
        }
        return {name: LoraFactors(*pair) for name, pair in received.items()}

    def _own_part(self, factors: Mapping[str, LoraFactors], message: FederationMessage) -> dict[str, LoraFactors]:
        """Return the leading directions of the server's factors, as many as this client has, in its own scaling."""
        own = {}
        for layer in self.layers:
            lora_A, lora_B = factors[layer.name]
            rank, given = layer.lora_A.shape[0], lora_A.shape[0]
            server_scaling = message.scalings[layer.name]
            if (rank != given or layer.scaling != server_scaling) and message.method not in ("fedsvd", "flora"):
                raise ValueError(
                    f"layer {layer.name!r} of client {self.name!r} has rank {rank} and scaling {layer.scaling:g}, the "
                    f"server's {given} and {server_scaling:g}: {message.method!r} averages factors entry by entry. "
                    "Give all clients one rank and lora_alpha, or use aggregation='fedsvd' or 'flora'."
                )
            if rank > given:
                raise ValueError(
                    f"layer {layer.name!r} of client {self.name!r} has rank {rank}, more than the server's {given}: "
                    "the server's adapter must be the largest."
                )
            ratio = server_scaling / layer.scaling
            own[layer.name] = LoraFactors(lora_A[:rank], lora_B[:, :rank] * ratio if ratio != 1 else lora_B[:, :rank])
        return own

    def _changes(self) -> dict[str, Tensor]:
        return {
            name: sum((part.lora_B.double() @ part.lora_A.double() for part in parts), torch.zeros(()))
            for name, parts in self._folded.items()
            if parts
        }

    def _refuse_other_base(self, message: FederationMessage) -> None:
        if message.method != self.config.aggregation:
            raise ValueError(
                f"the server aggregates by {message.method!r}, and client {self.name!r} was set up for "
                f"{self.config.aggregation!r}: it would train the wrong factors. Give both the same FedSVDConfig."
            )
        start, own_start = (message.init_lora_A, message.federation_seed), _start(self.config)
        if start != own_start:
            raise ValueError(
                f"the server's rows come from init_lora_A, federation_seed = {start}, those of client {self.name!r} "
                f"from {own_start}: it would train B for other rows. Give both the same FedSVDConfig."
            )
        missing = set(message.lora_B) ^ set(self.layers.names)
        if missing:
            raise ValueError(
                f"client {self.name!r} adapts other layers than the server (differing: {sorted(missing)[:3]}). Give "
                "all clients the server's target_modules."
            )
        if message.base != self.layers.fingerprint():
            kinds = sorted({layer.kind for layer in self.layers})
            raise ValueError(
                f"the base of client {self.name!r} is not the server's: same layers, other shapes or another "
                f"quantisation (here: {', '.join(kinds)}). Updates belong to the weights they were trained on; load "
                "the same base with the same quantization_config everywhere."
            )

    def _refuse_trainable_A(self) -> None:
        if self.config.aggregation in TRAINS_ONLY_B:
            trained = [layer.name for layer in self.layers if layer.lora_A.requires_grad]
            if trained:
                raise ValueError(
                    f"aggregation={self.config.aggregation!r} trains B only, and lora_A of {trained[0]!r} is "
                    "trainable as well: its changes would not be sent, and A would leave the server's subspace. Call "
                    "hfnoise.freeze_lora_A(model) before the Trainer is built."
                )
        frozen = [layer.name for layer in self.layers if not layer.lora_B.requires_grad]
        if frozen:
            raise ValueError(f"lora_B of {frozen[0]!r} is frozen: the client would learn nothing. Make it trainable.")


def _start(config: FedSVDConfig) -> tuple[str, int]:
    return config.init_lora_A, config.federation_seed


def _read(file: Path | None) -> ClientRecord:
    if file is None or not file.exists():
        return ClientRecord()
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        record = ClientRecord(**content)
        reasons = [wrong_type(ClientRecord, name, value, texts=False) for name, value in content.items()]
        if any(reasons):
            raise ValueError(" ".join(filter(None, reasons)))
        return record
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(file)!r} is damaged ({error}): nobody knows how often this client took part, so its cap cannot be "
            "kept. Restore it, or count the runs on the ledger and write them in."
        ) from None


def _merged(one: ClientRecord, other: ClientRecord) -> ClientRecord:
    """Return what both know; of two numbers of rounds the larger is the safe one."""
    noise = other.noise_multiplier if one.noise_multiplier is None else one.noise_multiplier
    longer = one.rounds if len(one.rounds) >= len(other.rounds) else other.rounds
    return ClientRecord(list(longer), noise)


def _write(file: Path | None, record: ClientRecord) -> None:
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as output:
        json.dump(vars(record), output)
        output.flush()
        os.fsync(output.fileno())
    temporary.replace(file)
