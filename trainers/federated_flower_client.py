"""A client of a federation as a Flower ClientApp: made anew for every message, since its process ends after each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfnoise.privacy.ledger import LedgerEntry
from hfnoise.trainers.federated_client import FedSVDClient
from hfnoise.trainers.federated_config import FedSVDConfig
from hfnoise.trainers.federated_flower_records import (
    CONFIG,
    FACTORS,
    METRICS,
    WEIGHT,
    message_from_records,
    require_flower,
    run_config_settings,
    update_to_records,
)
from hfnoise.trainers.federated_flower_state import ClientState, read_state, remember
from hfnoise.trainers.federated_flower_strategy import CLIENT_ERROR
from hfnoise.trainers.federated_message import FederationMessage

logger = logging.getLogger(__name__)


def fedsvd_client_app(
    make_trainer: Callable[[Any], Any],
    config: FedSVDConfig | None = None,
    *,
    clients: int | None = None,
    evaluate: bool = False,
) -> Any:
    """Return a Flower ClientApp that takes part in a federation with a Trainer on the client's data.

    A SuperNode starts a process for every message. What a client must not forget lies in `Context.state`: rounds,
    noise multiplier, the entries of its ledger, the rows, its last answer (asked again for it, it sends it again and
    spends nothing). With `--node-config 'state-dir="..."'`, a folder for one federation, all this is also kept in
    files there, which outlive the SuperNode and the run; of file and state the larger spending counts. Other keys of
    the node configuration: `client-name` (else `partition-id`, else the node's number) and `max-participations`,
    by which the owner of a node sets its own cap.

    Formal guarantee: that of [`FedSVDClient`]: what is sent of a private Trainer's data has the epsilon of the
    client's own ledger. Not covered: metrics of `evaluate=True`, which are sent as they are; what the app's code does
    beside: Flower runs the code of whoever submits a run, so accept only apps that the node's owner has read.

    Args:
        make_trainer (`Callable`): given Flower's Context, returns a Trainer on this client's data; for `"fedsvd"` and
            `"ffa"` on a model whose factors A are frozen, see [`freeze_lora_A`].
        config ([`FedSVDConfig`], *optional*): of the federation; by default what the run configuration says.
        clients (`int`, *optional*): how many there are, for the default cap; by default `clients` of the run
            configuration.
        evaluate (`bool`, defaults to `False`): answer requests for evaluation, with `trainer.evaluate()`.

    Returns:
        `flwr.clientapp.ClientApp`. It answers with an error, and goes on being asked, for a message that is stale,
        corrupted or of another federation; and is not asked again once its cap or its budget is spent.

    Raises:
        ImportError: without Flower; names the extra.
        TypeError: for a `make_trainer` that cannot be called.

    Example:
        >>> from hfnoise.trainers.federated_flower import fedsvd_client_app
        >>> fedsvd_client_app("a string")
        Traceback (most recent call last):
        ...
        TypeError: make_trainer must be a function of Flower's Context that returns a Trainer, got str.
    """
    if not callable(make_trainer):
        raise TypeError(
            f"make_trainer must be a function of Flower's Context that returns a Trainer, got "
            f"{type(make_trainer).__name__}."
        )
    flower = require_flower()
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def train(message: Any, context: Any) -> Any:
        def act(client: FedSVDClient, state: ClientState, received: FederationMessage) -> Any:
            return _trained(client, state, received, message.content[CONFIG][FACTORS], context)

        return _answer(message, context, act)

    def evaluated(message: Any, context: Any) -> Any:
        if not evaluate:
            reason = "this client does not evaluate: metrics of its data would leave it without noise."
            return flower.Message(flower.Error(CLIENT_ERROR, reason), reply_to=message)
        return _answer(message, context, lambda client, _, received: _evaluated(client, received))

    def _answer(message: Any, context: Any, act: Callable[..., Any]) -> Any:
        try:
            received = message_from_records(message.content)
            client, state = _client(make_trainer, config, clients, context)
            return flower.Message(act(client, state, received), reply_to=message)
        except (TypeError, ValueError) as error:
            logger.exception("this client does not answer")
            reason = f"{type(error).__name__}: {error}"
            return flower.Message(flower.Error(CLIENT_ERROR, reason), reply_to=message)

    app.train()(train)
    app.evaluate()(evaluated)
    return app


def client_name(context: Any) -> str:
    """Return the name of a client in reports: the same after a restart of its SuperNode, if its owner gave one."""
    node = context.node_config
    if "client-name" in node:
        return str(node["client-name"])
    return f"client-{node['partition-id']}" if "partition-id" in node else f"node-{context.node_id}"


def _client(
    make_trainer: Callable[[Any], Any], config: FedSVDConfig | None, clients: int | None, context: Any
) -> tuple[FedSVDClient, ClientState]:
    config = run_config_settings(context.run_config) if config is None else config
    if "max-participations" in context.node_config:
        config = replace(config, max_participations=context.node_config["max-participations"])
    clients = context.run_config.get("clients") if clients is None else clients
    if clients is None and config.max_participations is None:
        raise ValueError(
            "the cap of a client, to which its noise is calibrated, follows from the number of clients: give "
            "clients=..., or 'clients' in the run configuration, or max_participations."
        )
    folder = context.node_config.get("state-dir")
    state = read_state(context, folder)
    with _errors_stay_here("building the Trainer"):
        trainer = make_trainer(context)
    client = FedSVDClient(
        client_name(context),
        trainer,
        config,
        clients=int(clients or 1),
        state_dir=None if folder is None else str(folder),
        record=state.record,
    )
    training = client._training
    if training.is_private:
        if folder is None:  # only of a Trainer with a known seed, which would forget it in every process
            training.keep_ledger(Path(client.trainer.args.output_dir) / "ledger.json")
        # The ledger is the truth; where the disk forgot what the state knows, the larger spending counts.
        for entry in state.ledger:
            client.trainer._ledger().charge(LedgerEntry(**entry))
    state.restore(client)
    return client, state


def _trained(client: FedSVDClient, state: ClientState, message: FederationMessage, digest: str, context: Any) -> Any:
    if state.answers(message.round, digest):
        # The server did not get it, or was restarted. Sent again, it is the same release: nothing is charged.
        return state.answer
    state.refuse_other(client.name, message.round)
    rounds = client.participations
    answer = None
    try:
        answer = update_to_records(client.step(message))
        return answer
    except Exception as error:
        if client.participations == rounds:  # refused by our own checks, before any row was looked at
            raise
        raise _kept_here("training", error) from error
    finally:
        if client.participations > rounds:  # a round that broke off may have released something, and counts
            remember(client, context, digest, answer)


@contextmanager
def _errors_stay_here(doing: str) -> Iterator[None]:
    """What goes wrong on private rows may quote them, and the reason of an error is sent to the server."""
    try:
        yield
    except Exception as error:
        raise _kept_here(doing, error) from error


def _kept_here(doing: str, error: Exception) -> ValueError:
    return ValueError(
        f"{doing} failed with {type(error).__name__}; what it says may quote data and stays in the client's log."
    )


def _evaluated(client: FedSVDClient, message: FederationMessage) -> Any:
    """Evaluate on the server's factors; the client's state stays as it was."""
    client.take(message)
    with _errors_stay_here("evaluating"):
        found = client.trainer.evaluate()
    metrics = {key: float(value) for key, value in found.items() if isinstance(value, (int, float))}
    examples = client.examples if client.config.weighting == "examples" else 1
    flower = require_flower()
    return flower.RecordDict({METRICS: flower.MetricRecord({**metrics, WEIGHT: examples})})
