"""The server of a federation: it averages, rotates, remembers, and never sees an example."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfnoise.privacy.hf_lora_export import check_adapter_config, save_lora_adapter
from hfnoise.privacy.lora_aggregation import aggregate_lora, average_lora_B
from hfnoise.privacy.lora_export import export_factors
from hfnoise.privacy.lora_factors import LoraFactors, stack_factors
from hfnoise.privacy.lora_state import LoraRotation
from hfnoise.trainers.federated_config import TRAINS_ONLY_B, FedSVDConfig
from hfnoise.trainers.federated_layers import LoraLayers, exported_parts
from hfnoise.trainers.federated_message import ClientUpdate, FederationMessage, refuse_statements
from hfnoise.trainers.federated_saving import load_server, save_server
from hfnoise.trainers.federated_start import layer_seed, start_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Participation:
    """What the server knows of a client, from its last answer.

    Args:
        participations (`int`): rounds in which it took part, by its own count.
        epsilon (`float`, *optional*): of everything on its ledger; None without privacy.
        delta (`float`, *optional*): of the same.
        examples (`int`, *optional*): n_k, unless hidden.
        last_round (`int`): that it answered.
    """

    participations: int
    epsilon: float | None
    delta: float | None
    examples: int | None
    last_round: int


class FedSVDServer:
    """The server's state: the factors of every layer, what was folded into the frozen weights, who took part.

    A round is `message()`, the clients' `step(...)`, `aggregate(...)`. FedSVD's rotation is done by `rotate()`, which
    `message()` calls when an average is waiting: so any engine that averages B by itself (Flower's FedAvg) can hand
    the average over by `take_average(...)`.

    Formal guarantee: none of its own. All it handles was released by clients, so averaging, rotating, refreshing and
    exporting are post-processing. If no example is at two clients, the adapter as a whole is (max epsilon_k,
    max delta_k)-differentially private.

    Args:
        model: a PEFT model with one LoRA adapter; only layers, base weights and scalings are read, until `apply_to`.
        config ([`FedSVDConfig`]): of the federation.

    Raises:
        TypeError, ValueError: for a model without a plain LoRA adapter, one that could not be exported as such, or a
            quantised base where updates are folded.

    Example:
        >>> from hfnoise import FedSVDConfig, FedSVDServer
        >>> FedSVDServer("a string", FedSVDConfig())
        Traceback (most recent call last):
        ...
        ValueError: a federation needs a PEFT model with a LoRA adapter, got str. Use peft.get_peft_model.
    """

    def __init__(self, model: Any, config: FedSVDConfig) -> None:
        if not isinstance(config, FedSVDConfig):
            raise TypeError(f"config must be a FedSVDConfig, got {type(config).__name__}.")
        layers = LoraLayers.of(model)
        self.config, self.base, self.scalings = config, layers.fingerprint(), layers.scalings
        self._adapter_config, self._heads = exported_parts(model)
        check_adapter_config(self._adapter_config, self._heads)  # now, not after the last round
        if config.aggregation in ("flora", "fedex") or config.subspace == "refresh":
            quantized = [layer for layer in layers if layer.is_quantized]
            if quantized:
                raise ValueError(
                    f"the base is quantised ({quantized[0].kind}), and {config.aggregation!r} with "
                    f"subspace={config.subspace!r} adds updates to its weights. Use aggregation='fedsvd' or 'ffa' "
                    "with subspace='fixed', or a base that is not quantised."
                )
        given = layers.read()
        lora_B = {name: torch.zeros_like(factors.lora_B) for name, factors in given.items()}
        if config.init_lora_A == "keep":
            lora_A = {name: factors.lora_A for name, factors in given.items()}
            lora_B = {name: factors.lora_B for name, factors in given.items()}
        else:
            if any(bool(factors.lora_B.any()) for factors in given.values()):
                logger.warning(
                    "the adapter is trained already (B is not zero), and the federation starts a new one: "
                    "init_lora_A=%r. To go on from it, use init_lora_A='keep'.", config.init_lora_A,
                )  # fmt: skip
            lora_A = start_rows(layers, config, lora_B)
        self.round = 0
        self.participants: dict[str, Participation] = {}
        self.rotations: dict[str, LoraRotation] = {}
        if config.aggregation == "fedsvd":
            self.rotations = {name: LoraRotation(name, lora_A[name], lora_B[name]) for name in lora_A}
        self._lora_A, self._lora_B = lora_A, lora_B
        self._average: dict[str, Tensor] | None = None
        # Of "flora" and "fedex": one update of the frozen weights for every round, in units of the weight.
        self._residuals: list[dict[str, LoraFactors]] = []
        self._refreshes: list[int] = []  # rounds that began with a refresh

    @property
    def names(self) -> list[str]:
        """Layers, in the order of the model."""
        return list(self.scalings)

    def message(self, since: int | None = None) -> FederationMessage:
        """Return what a client gets for this round.

        Args:
            since (`int`, *optional*): the last round whose message the client holds; None if it joins now, or has
                forgotten. Whoever missed a refresh gets the rows anew.
        """
        self.rotate()
        config = self.config
        known: dict[str, Any] = {
            "method": config.aggregation, "round": self.round, "base": self.base, "scalings": dict(self.scalings),
            "init_lora_A": config.init_lora_A, "federation_seed": config.federation_seed,
        }  # fmt: skip
        if config.aggregation != "fedsvd":
            sends_A = config.aggregation != "ffa" or (since is None and config.init_lora_A in ("keep", "w0_svd"))
            held = 0 if since is None else min(since, len(self._residuals))
            folded = {name: [part[name] for part in self._residuals[held:]] for name in self.names}
            return FederationMessage(
                **known,
                lora_B=dict(self._lora_B),
                lora_A=dict(self._lora_A) if sends_A else {},
                folded={name: parts for name, parts in folded.items() if parts},
                folded_since=held,
            )
        missed = since is None or any(since < refreshed < self.round for refreshed in self._refreshes)
        if missed and (self._refreshes or config.init_lora_A in ("keep", "w0_svd")):
            messages = {name: one.joining_message() for name, one in self.rotations.items()}
            start = {name: one.basis_rows for name, one in self.rotations.items()}
            folded = {name: self._folded(name) for name in self.names if self.rotations[name].folded}
            return FederationMessage(
                **known, lora_B={name: one.lora_B for name, one in messages.items()}, rotations=messages,
                start=start, folded=folded,
            )  # fmt: skip
        messages = {name: one.message() for name, one in self.rotations.items()}
        held = len(self._refreshes) - (self.round in self._refreshes)
        return FederationMessage(
            **known, lora_B={name: one.lora_B for name, one in messages.items()}, rotations=messages,
            folded_since=held,
        )  # fmt: skip

    def aggregate(self, updates: Sequence[ClientUpdate]) -> None:
        """Average what the clients of a round sent; the next round begins.

        Args:
            updates (`Sequence[ClientUpdate]`): at least one; whoever dropped out is simply not among them.

        Raises:
            ValueError: for no update, one of another round, two of one client, other layers, ranks that the method
                does not take, or factors that are not finite. The state stays as it was.
        """
        self.check(updates)
        weights = None if self.config.weighting == "uniform" else [update.examples for update in updates]
        if self.config.aggregation == "fedsvd":
            average = {name: self._average_of(name, updates, weights) for name in self.names}
            self.count(updates)
            self.take_average(average)
            return
        results = {
            name: aggregate_lora(
                self.config.aggregation,
                self._lora_A[name],
                self._lora_B[name],
                None if self.config.aggregation == "ffa" else [update.lora_A[name] for update in updates],
                [update.lora_B[name] for update in updates],
                weights,  # type: ignore[arg-type]
                [update.scalings[name] for update in updates],
                server_scaling=self.scalings[name],
            )
            for name in self.names
        }
        self.count(updates)
        self._lora_A = {name: result.lora_A for name, result in results.items()}
        self._lora_B = {name: result.lora_B for name, result in results.items()}
        residuals = {name: result.residual for name, result in results.items() if result.residual is not None}
        if residuals:
            self._residuals.append(residuals)
        self.round += 1

    def take_average(self, lora_B: Mapping[str, Tensor], lora_A: Mapping[str, Tensor] | None = None) -> None:
        """Take an average that was made elsewhere, entry by entry: `"fedsvd"` (for the next `rotate()`), `"ffa"`.

        Args:
            lora_B (`dict[str, Tensor]`): of every layer, `(outputs, rank)`.
            lora_A (`dict[str, Tensor]`, *optional*): of `"fedavg"`, which trains both factors.

        Raises:
            ValueError: for another method, other layers or shapes, or while an average is waiting already.
        """
        method = self.config.aggregation
        if method not in (*TRAINS_ONLY_B, "fedavg") or (lora_A is not None) != (method == "fedavg"):
            raise ValueError(
                f"{method!r} does not take such an average: 'fedsvd' and 'ffa' take one of B, 'fedavg' of B and A; "
                "'flora' and 'fedex' need aggregate(updates)."
            )
        if self._average is not None:
            raise ValueError("an average is waiting already: call rotate() (or message()) first.")
        held = self.factors()
        for given, part in ((lora_B, "lora_B"), (lora_A, "lora_A")):
            if given is None:
                continue
            if set(given) != set(self.names):
                raise ValueError(
                    f"the average has other layers than the server: {sorted(set(given) ^ set(self.names))[:3]}."
                )
            for name, value in given.items():
                own = getattr(held[name], part)
                if value.shape != own.shape or value.dtype != own.dtype or not bool(value.isfinite().all()):
                    raise ValueError(
                        f"the average {part} of layer {name!r} must be finite, {own.dtype} and of shape "
                        f"{tuple(own.shape)}, got {value.dtype}, {tuple(value.shape)}."
                    )
        if method == "fedsvd":
            self._average = {name: lora_B[name] for name in self.names}
            return
        self._lora_B = {name: lora_B[name] for name in self.names}
        if lora_A is not None:
            self._lora_A = {name: lora_A[name] for name in self.names}
        self.round += 1

    def rotate(self) -> int:
        """Begin the next round if an average is waiting: rotate, and refresh if it is time; return the round."""
        if self._average is None:
            return self.round
        following = self.round + 1
        refresh = self.config.subspace == "refresh" and following % self.config.refresh_every == 0
        for name, rotation in self.rotations.items():
            replaced = min(self.config.refresh_directions or rotation.rank, rotation.rank) if refresh else 0
            seed = layer_seed(self.config.federation_seed, name, following)
            rotation.advance(self._average[name], replaced=replaced, seed=seed)
        if refresh:
            self._refreshes.append(following)
        self._average, self.round = None, following
        return self.round

    def epsilon(self) -> float | None:
        """Return the largest epsilon that a client reported; None if nobody trained privately."""
        found = [one.epsilon for one in self.participants.values() if one.epsilon is not None]
        return max(found, default=None)

    def factors(self) -> dict[str, LoraFactors]:
        """Return A and B of every layer as they are now, an average that waits included."""
        if self.config.aggregation != "fedsvd":
            return {name: LoraFactors(self._lora_A[name], self._lora_B[name]) for name in self.names}
        waiting = self._average or {}
        return {name: LoraFactors(one.lora_A, waiting.get(name, one.lora_B)) for name, one in self.rotations.items()}

    def folded(self) -> dict[str, LoraFactors]:
        """Return what was added to the frozen weights, in units of the weight; {} if nothing was."""
        if self.config.aggregation == "fedsvd":
            parts = {name: self._folded(name) for name in self.names}
        else:
            parts = {name: [one[name] for one in self._residuals] for name in self.names}
        return {name: stack_factors(found) for name, found in parts.items() if found}

    def apply_to(self, model: Any) -> Any:
        """Put the server's factors, and what was folded, into a model, for evaluation; return the model."""
        layers = LoraLayers.of(model)
        layers.fold({name: part.lora_B.double() @ part.lora_A.double() for name, part in self.folded().items()})
        layers.write(self.factors())
        return model

    def export_adapter(self, folder: str | Path, rank: int | None = None) -> dict[str, float]:
        """Write a plain PEFT adapter with everything folded, truncated to a rank if given; return what was left out.

        `PeftModel.from_pretrained(base, folder)` loads it without hfnoise; `merge_and_unload()` works as ever.

        Args:
            folder (`str` or `Path`): for `adapter_model.safetensors` and `adapter_config.json`.
            rank (`int`, *optional*): of every layer at most; default exact, r (1 + folds).
        """
        folded = self.folded()
        whole = {}
        for name, (lora_A, lora_B) in self.factors().items():
            parts = (
                [LoraFactors(folded[name].lora_A, folded[name].lora_B / self.scalings[name])] if name in folded else []
            )
            factors, _ = export_factors(lora_A, lora_B, parts)
            smaller = min(factors.lora_B.shape[0], factors.lora_A.shape[1])
            # More directions than the matrix has are no gain: this truncation leaves nothing out.
            whole[name] = factors.truncated(smaller)[0] if factors.rank > smaller else factors
        return save_lora_adapter(
            folder, whole, self._adapter_config, self.scalings, rank=rank, extra_state=self._heads
        )

    def save(self, folder: str | Path) -> None:
        """Write the whole state, from which a restarted server goes on as before; whole or not at all."""
        save_server(self, Path(folder))

    def load(self, folder: str | Path) -> None:
        """Take over a state that `save` wrote.

        Raises:
            ValueError: if there is none, it is damaged, or of another federation.
        """
        load_server(self, Path(folder))

    def report(self) -> dict[str, Any]:
        """Return rounds, clients, participations and epsilons, as the card states them."""
        return {
            "rounds": self.round + (self._average is not None),
            "clients": {name: asdict(one) for name, one in sorted(self.participants.items())},
            "epsilon": self.epsilon(),
            "config": asdict(self.config),
        }

    def _folded(self, name: str) -> list[LoraFactors]:
        scaling = self.scalings[name]
        return [LoraFactors(part.lora_A, part.lora_B * scaling) for part in self.rotations[name].folded]

    def _average_of(self, name: str, updates: Sequence[ClientUpdate], weights: Any) -> Tensor:
        rotation = self.rotations[name]
        return average_lora_B(
            rotation.lora_A, rotation.lora_B, [update.lora_B[name] for update in updates], weights,
            [update.scalings[name] for update in updates], server_scaling=self.scalings[name],
        )  # fmt: skip

    def count(self, updates: Sequence[ClientUpdate]) -> None:
        """Remember what clients said of their participations and epsilons; `aggregate` does, engines call it."""
        for update in updates:
            self.participants[update.client] = Participation(
                update.participations, update.epsilon, update.delta, update.examples, update.round
            )

    def check(self, updates: Sequence[ClientUpdate]) -> None:
        """Raise ValueError for answers that must not be averaged in this round; `aggregate` does, engines call it."""
        if not updates:
            raise ValueError("no client answered: there is nothing to average. Repeat the round.")
        names = [update.client for update in updates]
        if len(set(names)) < len(names):
            raise ValueError(f"a client answered twice: {sorted(names)}. Take one answer of each.")
        for update in updates:
            if self._average is not None or update.round != self.round:
                raise ValueError(
                    f"client {update.client!r} answers round {update.round}, and the server is at round {self.round}: "
                    "its factors belong to other rows. Drop them."
                )
            if set(update.lora_B) != set(self.names):
                differing = sorted(set(update.lora_B) ^ set(self.names))[:3]
                raise ValueError(
                    f"client {update.client!r} adapts other layers than the server (differing: {differing}). Give all "
                    "clients the same target_modules."
                )
            if update.base != self.base:
                raise ValueError(
                    f"client {update.client!r} trained on another base (shapes or quantisation differ): its factors "
                    "are updates of other weights. Drop it, or load the same base everywhere."
                )
            refuse_statements(update, self.names, self.config.weighting)
            if self.config.aggregation in TRAINS_ONLY_B and update.lora_A:
                raise ValueError(
                    f"client {update.client!r} sent lora_A, which {self.config.aggregation!r} keeps frozen: it "
                    "trained both factors. Call hfnoise.freeze_lora_A(model) there before the Trainer is built."
                )
