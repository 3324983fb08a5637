"""FedSVD as a Flower strategy: FedAvg averages, our server rotates before the next round is sent out."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from hfnoise.trainers.federated_client import ParticipationError
from hfnoise.trainers.federated_flower_records import (
    ARRAYS,
    CONFIG,
    FACTORS,
    WEIGHT,
    array_record,
    message_to_records,
    require_flower,
    tensors_of,
    update_from_records,
)
from hfnoise.trainers.federated_local import SpentBudgetError
from hfnoise.trainers.federated_message import ClientUpdate, tensors_digest
from hfnoise.trainers.federated_server import FedSVDServer
from hfnoise.trainers.federated_simulation import RoundRecord

logger = logging.getLogger(__name__)

AVERAGED_BY_FLOWER = ("fedsvd", "ffa", "fedavg")
# Of a client that will not take part again; a reason begins with the name of the error.
SPENT_ERRORS = (ParticipationError.__name__, SpentBudgetError.__name__)
CLIENT_ERROR = 2  # flwr's ErrorCode.CLIENT_APP_RAISED_EXCEPTION: the client itself says what went wrong
_POLL_SECONDS = 1.0


def fedsvd_strategy(
    server: FedSVDServer,
    *,
    min_available_nodes: int = 2,
    min_train_nodes: int = 1,
    wait_seconds: float = 600.0,
    fraction_evaluate: float = 0.0,
) -> Any:
    """Return a Flower strategy, a subclass of `flwr.serverapp.strategy.FedAvg`, that runs the rounds of a server.

    `configure_train` hands FedAvg's average to the server, which rotates it, and gives every client what it lacks:
    B and R, to those that join late or missed a refresh also the rows and what was folded. `aggregate_train` is
    FedAvg's own; answers of another round, base, rank or weight, or with numbers that are not finite, are left out
    before it sees them. A client that says that its cap or budget is spent is not asked again; one that did not
    answer is left out of as many rounds as it has missed in a row.

    Formal guarantee: none of its own; it handles what clients have released. The wrappers of Flower that add central
    noise accept this strategy, and their epsilon is of another unit (a client) and another adversary: it neither adds
    to nor replaces that of the clients' ledgers.

    Args:
        server ([`FedSVDServer`]): of `"fedsvd"`, `"ffa"` or `"fedavg"`.
        min_available_nodes (`int`, defaults to `2`): clients to wait for before the first round.
        min_train_nodes (`int`, defaults to `1`): clients to wait for before later rounds.
        wait_seconds (`float`, defaults to `600.0`): to wait for them at most.
        fraction_evaluate (`float`, defaults to `0.0`): share of the clients that evaluate on data of their own after
            a round. Their metrics are not covered by any epsilon.

    Returns:
        the strategy; `records` holds a [`RoundRecord`] of every round so far, `take_average(arrays)` hands over the
        average of the last round.

    Raises:
        ImportError: without Flower; names the extra.
        TypeError, ValueError: for something that is no server, or a method that Flower's FedAvg cannot average.

    Example:
        >>> from hfnoise.trainers.federated_flower import fedsvd_strategy
        >>> fedsvd_strategy("a string")
        Traceback (most recent call last):
        ...
        TypeError: server must be a FedSVDServer, got str.
    """
    if not isinstance(server, FedSVDServer):
        raise TypeError(f"server must be a FedSVDServer, got {type(server).__name__}.")
    if server.config.aggregation not in AVERAGED_BY_FLOWER:
        raise ValueError(
            f"aggregation={server.config.aggregation!r} does not run over Flower: its FedAvg averages factors entry "
            f"by entry, and this method stacks them. Use one of {', '.join(AVERAGED_BY_FLOWER)}, or "
            "hfnoise.simulate_federation, which runs all of them in one process."
        )
    for name, count in (("min_available_nodes", min_available_nodes), ("min_train_nodes", min_train_nodes)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")
    return _strategy_class()(server, min_available_nodes, min_train_nodes, wait_seconds, fraction_evaluate)


@lru_cache(maxsize=1)
def _strategy_class() -> type:
    require_flower()
    from flwr.serverapp.strategy import FedAvg

    return type("FedSVD", (_Rounds, FedAvg), {"__doc__": _Rounds.__doc__})


class _Rounds:
    """The part of the strategy that is ours; `aggregate_train` must stay FedAvg's, which Flower's wrappers demand."""

    def __init__(
        self, server: FedSVDServer, min_available: int, min_train: int, wait_seconds: float, evaluate: float
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            min_train_nodes=min_train,
            min_available_nodes=min_available,
            fraction_evaluate=evaluate,
            min_evaluate_nodes=1,
            weighted_by_key=WEIGHT,
            arrayrecord_key=ARRAYS,
            configrecord_key=CONFIG,
            train_metrics_aggr_fn=_largest_spending,
        )
        self.server, self.records = server, list[RoundRecord]()
        self._min_available, self._min_train, self._wait_seconds = min_available, min_train, wait_seconds
        self._average_is_new = False
        self._names: dict[int, str] = {}  # of nodes that have answered
        self._held: dict[int, int] = {}  # the round whose message a node holds
        self._spent: set[int] = set()
        self._missed: dict[int, int] = {}  # rounds in a row that a node did not answer ...
        self._resting: dict[int, int] = {}  # ... and for how many it is left alone
        self._asked: list[int] = []
        self._sent_bytes = 0

    def initial_arrays(self) -> Any:
        """Return the ArrayRecord to start from, `strategy.start(grid, strategy.initial_arrays())`."""
        self.server.rotate()
        both = self.server.config.aggregation == "fedavg"
        factors = self.server.factors()
        lora_A = {f"lora_A|{name}": one.lora_A for name, one in factors.items()} if both else {}
        return array_record({**lora_A, **{f"lora_B|{name}": one.lora_B for name, one in factors.items()}})

    def take_average(self, arrays: Any) -> None:
        """Hand the average of the last round to the server, once; `configure_train` does it if nobody did."""
        if not self._average_is_new:
            return
        found: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}}
        for key, value in tensors_of(arrays, "the average").items():
            kind, _, name = key.partition("|")
            found[kind][name] = value
        self.server.take_average(found["lora_B"], found["lora_A"] or None)
        self._average_is_new = False

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        """Rotate, choose clients, and return a message for each."""
        self.take_average(arrays)
        # In place: a wrapper that clips updates measures them from the object that it handed in here.
        for name, array in self.initial_arrays().items():
            arrays[name] = array
        self._asked = self._choose(grid)
        config["server-round"], config[FACTORS] = server_round, self._digest()
        messages = [self._message(node, config, "train") for node in self._asked]
        logger.info("round %d: asked %d clients", self.server.round, len(messages))
        return messages

    def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        """Return a message for each client that evaluates; the average of the round is taken over first."""
        self.take_average(arrays)
        if self.fraction_evaluate == 0.0:  # type: ignore[attr-defined]
            return []
        self.server.rotate()
        nodes = [node for node in sorted(grid.get_node_ids()) if not self._missed.get(node)]
        count = min(len(nodes), max(1, round(len(nodes) * self.fraction_evaluate)))  # type: ignore[attr-defined]
        config["server-round"], config[FACTORS] = server_round, self._digest()
        return [self._message(node, config, "evaluate") for node in self._draw(nodes, count, "evaluate")]

    def _digest(self) -> str:
        """Return what names the factors of a round: a client that is asked twice answers once."""
        found: dict[str, Tensor] = {}
        for name, factors in self.server.factors().items():
            found[f"lora_A|{name}"], found[f"lora_B|{name}"] = factors
        return tensors_digest(found)

    def _message(self, node: int, config: Mapping[str, Any], kind: str) -> Any:
        message = self.server.message(self._held.get(node))
        if kind == "train":
            self._sent_bytes = max(self._sent_bytes, message.nbytes)
        return require_flower().Message(message_to_records(message, config), node, kind)

    def _choose(self, grid: Any) -> list[int]:
        """Return the nodes of this round: among those that are connected, not spent, and not silent just now."""
        self._sent_bytes = 0
        needed = self._min_train if self.records else self._min_available
        give_up = time.monotonic() + self._wait_seconds
        while True:
            connected = set(grid.get_node_ids())
            able = connected - self._spent
            if len(able) >= needed or (connected and not able):
                break
            if time.monotonic() > give_up:
                raise TimeoutError(
                    f"round {self.server.round}: {len(able)} clients are connected, and {needed} are needed. Start "
                    "more SuperNodes and run the app again: it goes on from the state that was saved."
                )
            logger.info("waiting for clients: %d of %d are connected", len(able), needed)
            time.sleep(_POLL_SECONDS)
        awake = {node for node in able if not self._resting.get(node)}
        self._resting = {node: rounds - 1 for node, rounds in self._resting.items() if rounds > 1}
        nodes = sorted(awake if len(awake) >= self._min_train else able)
        wanted = self.server.config.clients_per_round or len(nodes)
        return self._draw(nodes, min(wanted, len(nodes)), "train")

    def _draw(self, nodes: list[int], count: int, purpose: str) -> list[int]:
        draw = random.Random(f"{self.server.config.federation_seed}/{self.server.round}/{purpose}/{len(self.records)}")
        return sorted(draw.sample(nodes, count))

    def _check_and_log_replies(
        self, replies: Iterable[Any], is_train: bool, validate: bool = True
    ) -> tuple[list[Any], list[Any]]:
        """FedAvg's `aggregate_train` begins with this: leave out what must not be averaged."""
        kept = list(replies)
        if is_train:
            kept = self._sorted_out(kept)
        found: tuple[list[Any], list[Any]] = super()._check_and_log_replies(kept, is_train, validate)  # type: ignore[misc]
        return found

    def _sorted_out(self, replies: list[Any]) -> list[Any]:
        kept, updates, answered, alive = [], list[ClientUpdate](), set[int](), set[int]()
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                kept.append(reply)  # FedAvg counts and logs it
                if (reply.error.reason or "").startswith(SPENT_ERRORS):
                    self._spent.add(node)
                if reply.error.code == CLIENT_ERROR:
                    alive.add(node)
                continue
            try:
                update = update_from_records(reply.content)
                self.server.check([*updates, update])
                self._refuse_other_shapes(update)
            except (TypeError, ValueError) as error:
                alive.add(node)
                logger.warning("round %d: the answer of node %d is left out: %s", self.server.round, node, error)
                continue
            kept.append(reply)
            updates.append(update)
            self._names[node], self._held[node] = update.client, update.round
            answered.add(node)
        for node in self._asked:
            if node not in answered:
                self._held.pop(node, None)  # whatever went wrong there, it gets everything next time
            if node in answered | alive:
                self._missed.pop(node, None)
            else:
                self._missed[node] = self._resting[node] = self._missed.get(node, 0) + 1
        self._record(updates)
        return kept

    def _record(self, updates: list[ClientUpdate]) -> None:
        self.server.count(updates)
        self._average_is_new = bool(updates)
        self.records.append(
            RoundRecord(
                self.server.round,
                sorted(self._names.get(node, f"node-{node}") for node in self._asked),
                sorted(update.client for update in updates),
                self._sent_bytes,
                max((update.nbytes for update in updates), default=0),
                {name: one.epsilon for name, one in sorted(self.server.participants.items())},
            )
        )

    def _refuse_other_shapes(self, update: ClientUpdate) -> None:
        """Flower averages entry by entry, so all must mean the same: ranks, scalings, finite numbers."""
        both = self.server.config.aggregation == "fedavg"
        if both != bool(update.lora_A):
            raise ValueError(
                f"client {update.client!r} sent other factors than {self.server.config.aggregation!r} has."
            )
        for name, (lora_A, lora_B) in self.server.factors().items():
            given = [(update.lora_B.get(name), lora_B), *([(update.lora_A.get(name), lora_A)] if both else [])]
            if any(value is None or value.shape != own.shape for value, own in given):
                raise ValueError(
                    f"client {update.client!r} has layer {name!r} in another rank than the server: Flower averages "
                    "entry by entry. Give all clients one rank, or use hfnoise.simulate_federation."
                )
            if update.scalings[name] != self.server.scalings[name]:
                raise ValueError(
                    f"client {update.client!r} has the scaling {update.scalings[name]:g} in layer {name!r}, and the "
                    f"server {self.server.scalings[name]:g}: Flower averages entry by entry. Give all clients one "
                    "lora_alpha, or use hfnoise.simulate_federation."
                )
            if not all(bool(value.isfinite().all()) for value, _ in given if value is not None):
                raise ValueError(f"client {update.client!r} sent numbers in layer {name!r} that are not finite.")


def _largest_spending(contents: list[Any], weighted_by_key: str) -> Any:
    """Return the largest epsilon, delta and number of participations: no average of them has a meaning."""
    metrics = [next(iter(content.metric_records.values())) for content in contents]
    keys = ("epsilon", "delta", "participations")
    return require_flower().MetricRecord({key: max(one[key] for one in metrics) for key in keys})
