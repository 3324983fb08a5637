"""The server of a federation as a Flower ServerApp: it saves after every round, and goes on from there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hfnoise.strict_json import parse_json
from hfnoise.trainers.federated_config import FedSVDConfig
from hfnoise.trainers.federated_flower_records import require_flower, run_config_settings
from hfnoise.trainers.federated_flower_strategy import fedsvd_strategy
from hfnoise.trainers.federated_saving import STATE_FILE
from hfnoise.trainers.federated_server import FedSVDServer
from hfnoise.trainers.federated_simulation import RoundRecord

logger = logging.getLogger(__name__)

REPORT_FILE, ADAPTER_FOLDER = "federation_report.json", "adapter"
_TABLE_WIDTH = 100  # a log is no terminal and has no width of its own


def fedsvd_server_app(
    make_model: Callable[[Any], Any],
    config: FedSVDConfig | None = None,
    *,
    output_dir: str | Path | None = None,
    evaluate: Callable[[FedSVDServer], dict[str, float]] | None = None,
    clients: int | None = None,
    round_timeout: float | None = None,
    fraction_evaluate: float = 0.0,
) -> Any:
    """Return a Flower ServerApp that runs a federation, saves it after every round, and resumes what it finds.

    A run that was stopped or killed goes on where it was saved when it is started again with the same `output_dir`:
    the round that was under way is repeated, and clients that have answered it send the same answer again.

    In `output_dir` there are in the end the state of the server, `federation_report.json` (rounds, clients,
    participations, epsilons), and `adapter/`, a plain PEFT adapter. A table of the rounds is printed.

    Formal guarantee: none of its own: it handles what clients have released. The report states the epsilon of each
    client, from its own ledger and as it says itself, and their maximum.

    Args:
        make_model (`Callable`): given Flower's Context, returns the PEFT model that all clients adapt.
        config ([`FedSVDConfig`], *optional*): of the federation; by default what the run configuration says.
        output_dir (`str` or `Path`, *optional*): by default `output-dir` of the run configuration.
        evaluate (`Callable`, *optional*): given the server after a round, returns metrics; see
            [`FedSVDServer.apply_to`].
        clients (`int`, *optional*): how many to wait for before the first round (`clients_per_round`, if that is
            set, will do); by default `clients` of the run configuration, or 2. Later rounds need one.
        round_timeout (`float`, *optional*): seconds to wait for answers; by default `round-timeout` of the run
            configuration, or 3600. Whoever answers later, or died, is left out of that round.
        fraction_evaluate (`float`, defaults to `0.0`): see [`fedsvd_strategy`].

    Raises:
        ImportError: without Flower; names the extra.
        TypeError: for a `make_model` that cannot be called.

    Example:
        >>> from hfnoise.trainers.federated_flower import fedsvd_server_app
        >>> fedsvd_server_app("a string")
        Traceback (most recent call last):
        ...
        TypeError: make_model must be a function of Flower's Context that returns a PEFT model, got str.
    """
    if not callable(make_model):
        raise TypeError(
            f"make_model must be a function of Flower's Context that returns a PEFT model, got "
            f"{type(make_model).__name__}."
        )
    require_flower()
    from flwr.serverapp import ServerApp

    app = ServerApp()

    def main(grid: Any, context: Any) -> None:
        settings = context.run_config
        folder = output_dir if output_dir is not None else settings.get("output-dir")
        if not folder:
            raise ValueError(
                "a federation needs a folder for its state, report and adapter: give output_dir=..., or 'output-dir' "
                "in the run configuration."
            )
        federation = run_config_settings(settings) if config is None else config
        server = FedSVDServer(make_model(context), federation)
        wanted = int(settings.get("clients", 2) if clients is None else clients)
        strategy = fedsvd_strategy(
            server,
            min_available_nodes=min(wanted, federation.clients_per_round or wanted),
            fraction_evaluate=fraction_evaluate,
        )
        timeout = float(settings.get("round-timeout", 3600) if round_timeout is None else round_timeout)
        _Federation(server, strategy, Path(folder), evaluate).run(grid, timeout)

    app.main()(main)
    return app


class _Federation:
    """A run of the strategy, with its folder."""

    def __init__(
        self,
        server: FedSVDServer,
        strategy: Any,
        folder: Path,
        evaluate: Callable[[FedSVDServer], dict[str, float]] | None,
    ) -> None:
        self.server, self.strategy, self.folder, self.evaluate = server, strategy, folder, evaluate
        self.earlier: list[RoundRecord] = []  # of the runs before this one
        if (folder / STATE_FILE).exists():
            server.load(folder)
            self.earlier = _read_rounds(folder / REPORT_FILE, server.rotate())
            logger.warning("resuming the federation in %s at round %d", folder, server.round)

    @property
    def records(self) -> list[RoundRecord]:
        return [*self.earlier, *self.strategy.records]

    def run(self, grid: Any, timeout: float) -> None:
        """Run the rounds that are missing, export, and print."""
        rounds = self.server.config.rounds
        while (left := rounds - self.server.rotate()) > 0:
            before = self.server.round
            self.strategy.start(
                grid, self.strategy.initial_arrays(), num_rounds=left, timeout=timeout, evaluate_fn=self._after_round
            )
            if self.server.rotate() == before:
                break  # whoever could answer did not, in as many attempts as there were rounds left
        self._write_report()
        left_out = self.server.export_adapter(self.folder / ADAPTER_FOLDER)
        logger.info("exported to %s (left out: %g)", self.folder / ADAPTER_FOLDER, max(left_out.values(), default=0.0))
        Console(width=_TABLE_WIDTH).print(federation_table(self.records))
        if self.server.round < rounds:
            logger.warning(
                "%d of %d rounds were answered: clients have reached their caps or budgets, or were not there. The "
                "adapter is that of the last round; run the app again to go on.", self.server.round, rounds,
            )  # fmt: skip

    def _after_round(self, server_round: int, arrays: Any) -> None:
        """Flower calls this with the average after every round, and once before the first."""
        if server_round == 0:
            return
        answered = bool(self.strategy.records[-1].answered)
        self.strategy.take_average(arrays)
        self.server.save(self.folder)
        if answered and self.evaluate is not None:
            self.strategy.records[-1].metrics.update(self.evaluate(self.server))
        self._write_report()

    def _write_report(self) -> None:
        content = {**self.server.report(), "history": [asdict(record) for record in self.records]}
        temporary = self.folder / f".{REPORT_FILE}.{os.getpid()}"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        temporary.replace(self.folder / REPORT_FILE)


def federation_table(records: list[RoundRecord]) -> Table:
    """Return the rounds of a federation as a table: who answered, metrics, bytes to and from a client, epsilon.

    Example:
        >>> from hfnoise.trainers.federated_flower import federation_table
        >>> [column.header for column in federation_table([]).columns]
        ['round', 'asked', 'answered', 'bytes down', 'bytes up', 'epsilon']
    """
    metrics = sorted({name for record in records for name in record.metrics})
    table = Table(title="Federation")
    for header in ("round", "asked", "answered", *metrics, "bytes down", "bytes up", "epsilon"):
        table.add_column(header, justify="left" if header == "answered" else "right")
    for record in records:
        table.add_row(
            str(record.round),
            str(len(record.chosen)),
            ", ".join(record.answered) or "nobody",
            *(f"{record.metrics[name]:.4g}" if name in record.metrics else "" for name in metrics),
            f"{record.bytes_down:,}",
            f"{record.bytes_up:,}",
            "none" if record.epsilon is None else f"{record.epsilon:.3f}",
        )
    return table


def _read_rounds(file: Path, round: int) -> list[RoundRecord]:
    """Return the rounds before this one that a report tells of; it is for reading, the state is what counts."""
    if not file.exists():
        return []
    history = parse_json(file.read_text(encoding="utf-8"), finite=False)["history"]
    return [RoundRecord(**record) for record in history if record["round"] < round]
