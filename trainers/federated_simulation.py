"""A federation in one process: the same server and clients as over a network, without one."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hfnoise.trainers.federated_client import FedSVDClient
from hfnoise.trainers.federated_local import SpentBudgetError
from hfnoise.trainers.federated_message import ClientUpdate
from hfnoise.trainers.federated_saving import STATE_FILE
from hfnoise.trainers.federated_server import FedSVDServer

logger = logging.getLogger(__name__)


# Attempts to draw a set that leaves a schedule; most draws do until the last rounds.
_DRAWS = 20
# Of the metrics, beside the bar; the others are in the records.
_SHOWN = ("eval_loss", "eval_accuracy", "accuracy")


class ClientDropout(RuntimeError):
    """Raised by a client that cannot finish a round: it is left out of the average, and may come back."""


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round.

    Args:
        round (`int`): its number, from 0.
        chosen (`list[str]`): clients that were asked.
        answered (`list[str]`): those that answered.
        bytes_down (`int`): arrays sent to one client, at most.
        bytes_up (`int`): arrays that one client sent, at most.
        epsilons (`dict[str, float | None]`): of every client so far, from its ledger.
        metrics (`dict[str, float]`): of `evaluate`.
    """

    round: int
    chosen: list[str]
    answered: list[str]
    bytes_down: int
    bytes_up: int
    epsilons: dict[str, float | None]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def epsilon(self) -> float | None:
        """The largest of all clients."""
        return max((one for one in self.epsilons.values() if one is not None), default=None)


def simulate_federation(
    server: FedSVDServer,
    clients: Sequence[FedSVDClient],
    *,
    evaluate: Callable[[FedSVDServer], dict[str, float]] | None = None,
    evaluate_every: int = 1,
    output_dir: str | Path | None = None,
    resume: bool = False,
    on_round: Callable[[RoundRecord], Any] | None = None,
    progress: bool = True,
) -> list[RoundRecord]:
    """Run all rounds of a federation in this process and return what happened in each.

    Clients are drawn for every round by the public `federation_seed`, among those that have not reached their cap. A
    client that raises [`ClientDropout`] or `ConnectionError` is left out of the round; a round that nobody answers is
    tried again with others, at most as often as there are clients. A client whose budget is spent, by other runs on
    its data or because rounds were added, is not asked again. When all have reached their caps it ends early.

    Formal guarantee: that of every client, see [`FedSVDClient`]; the simulation adds nothing. Caps hold however
    clients are drawn.

    Args:
        server ([`FedSVDServer`]): at its first round, or where an earlier call stopped.
        clients (`Sequence[FedSVDClient]`): with names of their own; they may share one model.
        evaluate (`Callable`, *optional*): given the server, returns metrics; after every `evaluate_every` rounds and
            the last one.
        evaluate_every (`int`, defaults to `1`): rounds between two evaluations.
        output_dir (`str` or `Path`, *optional*): the server's state is saved there after every round.
        resume (`bool`, defaults to `False`): go on from the state in `output_dir`, if there is one.
        on_round (`Callable`, *optional*): is given the [`RoundRecord`] of every round.
        progress (`bool`, defaults to `True`): show a bar.

    Returns:
        `list[RoundRecord]`: of the rounds that were run by this call.

    Raises:
        ValueError: for no clients, two of one name, `evaluate_every` below 1, `resume` without
            `output_dir`, or a round that nobody answers.

    Example:
        >>> from hfnoise import simulate_federation
        >>> simulate_federation(None, [])
        Traceback (most recent call last):
        ...
        ValueError: a federation needs clients, got none.
    """
    if not clients:
        raise ValueError("a federation needs clients, got none.")
    by_name = {client.name: client for client in clients}
    if len(by_name) < len(clients):
        raise ValueError(f"clients need names of their own, got {[client.name for client in clients]}.")
    if isinstance(evaluate_every, bool) or not isinstance(evaluate_every, int) or evaluate_every < 1:
        raise ValueError(f"evaluate_every must be a whole number of at least 1, got {evaluate_every!r}.")
    if resume and output_dir is None:
        raise ValueError("resume=True needs output_dir, where the state of the server was saved.")
    config = server.config
    if resume and output_dir is not None and (Path(output_dir) / STATE_FILE).exists():
        server.load(output_dir)
        for name, known in server.participants.items():
            if name in by_name:  # of two counts the larger is the safe one
                by_name[name].recall(known.participations)
    records: list[RoundRecord] = []
    spent: set[str] = set()
    bar = tqdm(total=config.rounds, initial=server.rotate(), desc="Rounds", disable=not progress)
    while server.rotate() < config.rounds:
        round = server.round
        chosen, updates, sent = _one_round(server, by_name, config.sampled(len(clients)), spent)
        if not updates:
            logger.warning(
                "the federation ends after %d of %d rounds: every client has taken part as often as its noise is "
                "calibrated to (rounds that broke off count), or has spent its budget.", round, config.rounds,
            )  # fmt: skip
            break
        server.aggregate(updates)
        if output_dir is not None:
            server.save(output_dir)
        metrics = {}
        if evaluate is not None and ((round + 1) % evaluate_every == 0 or round + 1 == config.rounds):
            metrics = dict(evaluate(server))
        record = RoundRecord(
            round, chosen, [update.client for update in updates], sent, max(update.nbytes for update in updates),
            {name: one.epsilon for name, one in sorted(server.participants.items())}, metrics,
        )  # fmt: skip
        records.append(record)
        if on_round is not None:
            on_round(record)
        bar.update(1)
        shown = {name: f"{value:.4g}" for name, value in metrics.items() if name in _SHOWN}
        bar.set_postfix({**shown, **({} if record.epsilon is None else {"epsilon": f"{record.epsilon:.3g}"})})
    bar.close()
    return records


def choose_clients(left: dict[str, int], wanted: int, rounds: int, draw: random.Random) -> list[str]:
    """Return the clients of a round, drawn at random, but so that the caps last for the rounds to come.

    Without that, the clients that chance has spared are left alone in the last rounds.

    Args:
        left (`dict[str, int]`): rounds that each client may still take part in.
        wanted (`int`): clients in a round.
        rounds (`int`): rounds to come, this one included.
        draw (`random.Random`): keyed by the round.

    Example:
        >>> from random import Random
        >>> from hfnoise.trainers.federated_simulation import choose_clients
        >>> choose_clients({"a": 2, "b": 1, "c": 1}, wanted=2, rounds=2, draw=Random(0))[0]
        'a'
    """
    able = sorted(name for name, count in left.items() if count > 0)
    wanted = min(wanted, len(able))
    for _ in range(_DRAWS):
        chosen = sorted(draw.sample(able, wanted))
        later = sum(min(left[name] - (name in chosen), rounds - 1) for name in able)
        if later >= min(sum(left[name] for name in able) - wanted, (rounds - 1) * wanted):
            return chosen
    # Those with most rounds left always leave a schedule; the draw only breaks ties.
    draw.shuffle(able)
    return sorted(sorted(able, key=lambda name: -left[name])[:wanted])


def _one_round(
    server: FedSVDServer, clients: dict[str, FedSVDClient], wanted: int, spent: set[str]
) -> tuple[list[str], list[ClientUpdate], int]:
    """Return who was asked, who answered, and the most bytes that one of them was sent; nobody, if none may.

    Clients that say that their budget is spent are added to `spent`.
    """
    for attempt in range(len(clients) + 1):
        left = {name: one.cap - one.participations for name, one in clients.items() if name not in spent}
        draw = random.Random(f"{server.config.federation_seed}/{server.round}/{attempt}")
        chosen = choose_clients(left, wanted, server.config.rounds - server.round, draw)
        if not chosen:
            return [], [], 0
        updates, sent = [], 0
        for name in chosen:
            message = server.message(clients[name].last_round)
            sent = max(sent, message.nbytes)
            try:
                updates.append(clients[name].step(message))
            except (ClientDropout, ConnectionError) as error:
                logger.warning("client %s dropped out of round %d: %s", name, server.round, error)
            except SpentBudgetError as error:
                spent.add(name)
                logger.warning("client %s takes no further part from round %d on: %s", name, server.round, error)
        if updates:
            return chosen, updates, sent
    raise ValueError(f"round {server.round}: no client answered in {len(clients) + 1} attempts.")
