"""FedSVDTrainer: a whole federation behind the interface of one Trainer, in one process."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
)
from transformers.trainer_utils import IntervalStrategy, TrainOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path

from hfnoise.errors import CheckpointError
from hfnoise.trainers.federated_client import FedSVDClient
from hfnoise.trainers.federated_config import TRAINS_ONLY_B, FedSVDConfig
from hfnoise.trainers.federated_layers import freeze_lora_A
from hfnoise.trainers.federated_push import STATE_FOLDER, FederatedPushMixin
from hfnoise.trainers.federated_saving import STATE_FILE
from hfnoise.trainers.federated_server import FedSVDServer
from hfnoise.trainers.federated_simulation import RoundRecord, simulate_federation
from hfnoise.trainers.federated_start import layer_seed
from hfnoise.trainers.private import DPConfig, DPSFTTrainer, DPTrainerMixin, make_private

logger = logging.getLogger(__name__)


class FedSVDTrainer(FederatedPushMixin):
    """Train one LoRA adapter on the data of several clients, each of them private or not: FedSVD (arXiv 2505.12805).

    The clients train one after the other in this process, on one model, as [`simulate_federation`] does; what they
    send and what each of them keeps is the same as over a network, where [`FedSVDServer`] and [`FedSVDClient`] (or the
    Flower app) take its place. Departures from the official code: the message of a round is B and an r x r rotation
    instead of the model; noise is calibrated to a cap on participations instead of to their expected number; epsilon
    is that of each client's ledger.

    Formal guarantee: with `dp_config`, the adapter is (max epsilon_k, max delta_k)-differentially private with respect
    to adding or removing one unit, if no unit is at two clients; see [`FedSVDClient`] for each of them.

    Args:
        model (`str` or model): a Hub id, a folder, or a model; with an adapter already, or with `peft_config`.
        args (`TrainingArguments`, *optional*): of the local Trainers. Steps and rounds are those of `fedsvd_config`;
            `eval_strategy="steps"` evaluates every `eval_steps` rounds, `"epoch"` every round, `"no"` after the last.
        fedsvd_config ([`FedSVDConfig`]): of the federation.
        train_dataset (`dict[str, Dataset]` or `Dataset`): data by client; or one dataset and `client_column`.
        eval_dataset (*optional*): on the server.
        client_column (`str`, *optional*): whose values name the clients.
        dp_config ([`DPConfig`] or `dict` of them by client, *optional*): of every client; without it nothing is
            private.
        peft_config (`peft.LoraConfig`, *optional*): of a model without an adapter.
        trainer_class (`type`, *optional*): of the local Trainers; `DPSFTTrainer` with `dp_config`, else
            `trl.SFTTrainer`. A class that is not private is made so, by [`make_private`].
        **kwargs: for the local Trainers, such as `processing_class`, `data_collator`, `compute_metrics`.

    Raises:
        TypeError, ValueError: at construction, for what no client, server or private Trainer would take.

    Example:
        >>> from hfnoise import FedSVDConfig, FedSVDTrainer
        >>> FedSVDTrainer("a model", fedsvd_config=FedSVDConfig(), train_dataset={})
        Traceback (most recent call last):
        ...
        ValueError: train_dataset holds no client. Give a dict of datasets by client, or client_column.
    """

    _name = "FedSVD"

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        fedsvd_config: FedSVDConfig,
        train_dataset: Mapping[str, Dataset] | Dataset,
        eval_dataset: Any = None,
        client_column: str | None = None,
        dp_config: DPConfig | Mapping[str, DPConfig] | None = None,
        peft_config: PeftConfig | None = None,
        trainer_class: type[Trainer] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(fedsvd_config, FedSVDConfig):
            raise TypeError(f"fedsvd_config must be a FedSVDConfig, got {type(fedsvd_config).__name__}.")
        self.fedsvd_config, self.dp_config = fedsvd_config, dp_config
        data = _by_client(train_dataset, client_column)
        privacy = _privacy_by_client(dp_config, list(data), fedsvd_config)
        self.args = copy.copy(args) if args is not None else SFTConfig("fedsvd")
        _refuse_secrets_inside(self.args.output_dir, privacy or {})
        if self.args.fsdp or self.args.deepspeed:
            raise ValueError(
                "FSDP and DeepSpeed shard a model over processes, and FedSVDTrainer runs the whole federation in one. "
                "Leave fsdp and deepspeed out; a 4- or 8-bit base takes less memory."
            )
        if self.args.world_size > 1:
            raise ValueError(
                f"FedSVDTrainer runs the whole federation in one process, and here are {self.args.world_size}: they "
                "would all do the same. Start it without a launcher; for clients on several machines use the Flower "
                "app (docs/flower.md)."
            )
        if isinstance(model, str):
            model = create_model_from_path(model, **(getattr(self.args, "model_init_kwargs", None) or {}))
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        if fedsvd_config.aggregation in TRAINS_ONLY_B:
            freeze_lora_A(model)
        self.model = model
        self.server = FedSVDServer(model, fedsvd_config)
        self.is_private = privacy is not None
        self._count = len(data)
        fedsvd_config.sampled(self._count)
        make = trainer_class or (DPSFTTrainer if self.is_private else SFTTrainer)
        self.clients = [
            self._client(name, rows, make, privacy[name] if privacy else None, eval_dataset if first else None, kwargs)
            for first, (name, rows) in zip([True, *[False] * len(data)], data.items(), strict=False)
        ]
        self.eval_dataset = eval_dataset
        self.processing_class = getattr(self.clients[0].trainer, "processing_class", None)
        self.records: list[RoundRecord] = []
        self.state, self._control = TrainerState(), TrainerControl()
        self.state.max_steps = fedsvd_config.rounds
        reporting = [] if self.args.report_to in ([], "none") else list(self.args.report_to)
        self._callbacks = CallbackHandler(
            [DefaultFlowCallback(), *get_reporting_integration_callbacks(reporting)],
            self.model,
            self.processing_class,
            None,
            None,
        )

    def _client(
        self, name: str, rows: Dataset, make: Any, privacy: DPConfig | None, eval_dataset: Any, kwargs: dict[str, Any]
    ) -> FedSVDClient:
        # Names come from a column of the data: "a/../b" is a name here, not a path.
        folder = Path(self.args.output_dir) / STATE_FOLDER / "clients" / quote(name, safe=" ").replace("..", "%2E%2E")
        args = copy.copy(self.args)
        args.report_to, args.push_to_hub, args.output_dir = [], False, str(folder)
        args.eval_strategy = IntervalStrategy.NO  # the server's adapter is evaluated, on the rounds
        if hasattr(args, "model_init_kwargs"):
            args.model_init_kwargs = None  # the model is built already
        built_private = privacy is not None and issubclass(make, DPTrainerMixin)
        more = {"dp_config": privacy} if built_private else {}
        trainer = make(self.model, args=args, train_dataset=rows, eval_dataset=eval_dataset, **more, **kwargs)
        if privacy is not None and not built_private:
            trainer = make_private(trainer, privacy)
        for callback in (ProgressCallback, PrinterCallback):  # one bar, of rounds, instead of one per client and round
            trainer.remove_callback(callback)
        return FedSVDClient(name, trainer, self.fedsvd_config, clients=self._count, state_dir=folder)

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Run the rounds; the server's state is saved after each, clients remember theirs.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): True (or "true", of a command line) goes on from the
                state in `output_dir`, a path from the state in another folder.

        Returns:
            `TrainOutput`: rounds, no loss (clients' losses are theirs), metrics of the last evaluation and epsilon.

        Raises:
            ValueError: if there is a state of an earlier run and `resume_from_checkpoint` does not say what to do, or
                none in the folder that it names.
        """
        folder = Path(self.args.output_dir) / STATE_FOLDER
        if str(resume_from_checkpoint).lower() in ("true", "false"):
            resume_from_checkpoint = str(resume_from_checkpoint).lower() == "true"
        if isinstance(resume_from_checkpoint, str) and resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            if not (folder / STATE_FILE).exists() and (folder / STATE_FOLDER / STATE_FILE).exists():
                folder = folder / STATE_FOLDER
            if not (folder / STATE_FILE).exists():
                raise CheckpointError(
                    f"there is no {STATE_FILE} in {str(folder)!r}: no federation was saved there. Name the output_dir "
                    "of an earlier run, or leave resume_from_checkpoint out."
                )
        if not resume_from_checkpoint and (folder / STATE_FILE).exists():
            raise CheckpointError(
                f"{str(folder)!r} holds the state of an earlier federation, whose clients remember their rounds. "
                "Resume it with train(resume_from_checkpoint=True), or use another output_dir."
            )
        evaluate = None if self.eval_dataset is None else lambda server: self.evaluate(log=False)
        every = _rounds_between_evaluations(self.args, self.fedsvd_config.rounds)
        self._control = self._callbacks.on_train_begin(self.args, self.state, self._control)
        self.records += simulate_federation(
            self.server, self.clients, evaluate=evaluate, evaluate_every=every, output_dir=folder,
            resume=bool(resume_from_checkpoint), on_round=self._log_round, progress=not self.args.disable_tqdm,
        )  # fmt: skip
        self._control = self._callbacks.on_train_end(self.args, self.state, self._control)
        self.server.apply_to(self.model)
        self.state.global_step = self.server.rotate()
        metrics: dict[str, Any] = {} if not self.records else dict(self.records[-1].metrics)
        if self.epsilon() is not None:
            metrics["privacy/epsilon"] = self.epsilon()
        return TrainOutput(self.state.global_step, float("nan"), metrics)

    def evaluate(self, eval_dataset: Any = None, *, log: bool = True) -> dict[str, float]:
        """Return the metrics of the server's adapter on the evaluation data; outside of the guarantee.

        Raises:
            ValueError: if there is none.
        """
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("there is no eval_dataset: give one to the Trainer or to evaluate().")
        self.server.apply_to(self.model)
        trainer = self.clients[0].trainer
        metrics = trainer.evaluate() if eval_dataset is None else trainer.evaluate(eval_dataset=eval_dataset)
        shown = {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and name != "epoch"}
        if log:
            self._log(shown)
        return shown

    def epsilon(self) -> float | None:
        """Return the largest epsilon of all clients, each from its own ledger; None without privacy."""
        found = [one for one in (client.epsilon() for client in self.clients) if one is not None]
        return max(found, default=None)

    def save_model(self, output_dir: str | None = None, rank: int | None = None) -> None:
        """Write a plain PEFT adapter, the tokenizer, `federation_report.json` and the card.

        Args:
            output_dir (`str`, *optional*): folder; `args.output_dir` by default.
            rank (`int`, *optional*): truncate what refreshes have added to this rank.
        """
        from hfnoise.trainers.federated_card import write_card_and_report

        folder = Path(output_dir or self.args.output_dir)
        write_card_and_report(self, folder)  # before the weights, so that none lie there without it
        self.server.export_adapter(folder, rank)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write the card to `output_dir/README.md`; what is given stays valid for cards written later."""
        from hfnoise.trainers.federated_card import write_card_and_report

        given = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags}
        self._card_values = {name: value for name, value in given.items() if value}
        write_card_and_report(self, Path(self.args.output_dir))

    _card_values: dict[str, Any] = {}

    def _log_round(self, record: RoundRecord) -> None:
        self.state.global_step = record.round + 1
        entry: dict[str, Any] = {**record.metrics, "federation/clients": len(record.answered)}
        entry |= {"federation/bytes_down": record.bytes_down, "federation/bytes_up": record.bytes_up}
        if record.epsilon is not None:
            entry["privacy/epsilon"] = record.epsilon
        self._log(entry)

    def _log(self, entry: dict[str, Any]) -> None:
        entry = {**entry, "round": self.state.global_step}
        self.state.log_history.append({**entry, "step": self.state.global_step})
        self._control = self._callbacks.on_log(self.args, self.state, self._control, entry)


def _rounds_between_evaluations(args: TrainingArguments, rounds: int) -> int:
    steps = args.eval_steps or 1
    if 0 < steps < 1:  # a share of all steps, as of a Trainer; here they are rounds
        steps = math.ceil(steps * rounds)
    return {"no": rounds, "steps": int(steps)}.get(str(args.eval_strategy.value), 1)


def _refuse_secrets_inside(output_dir: str | None, privacy: Mapping[str, DPConfig]) -> None:
    """A local Trainer looks at its own folder only, and `push_to_hub` uploads the one above all of them."""
    output = Path(output_dir or ".").expanduser().resolve()
    for name, config in privacy.items():
        for what in ("secret_file", "ledger_file"):
            given = getattr(config, what)
            if given is not None and config.unsafe_seed is None:
                if output in Path(given).expanduser().resolve().parents:
                    raise ValueError(
                        f"{what}={str(given)!r} of client {name!r} lies in output_dir={output_dir!r}, which is shared "
                        "and pushed: with the secret anybody can subtract the noise, and without the ledger nobody "
                        "knows what was spent. Put it elsewhere."
                    )


def _by_client(given: Any, column: str | None) -> dict[str, Dataset]:
    if isinstance(given, Dataset):
        if column is None or column not in given.column_names:
            raise ValueError(
                f"one dataset for all clients needs client_column, one of {given.column_names}; got {column!r}. Or "
                "give a dict of datasets by client."
            )
        rows: dict[str, list[int]] = {}
        for number, name in enumerate(given[column]):
            rows.setdefault(str(name), []).append(number)
        return {name: given.select(numbers).remove_columns(column) for name, numbers in sorted(rows.items())}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"train_dataset must be a dict of datasets by client, or a Dataset, got {type(given).__name__}."
        )
    if not given:
        raise ValueError("train_dataset holds no client. Give a dict of datasets by client, or client_column.")
    streams = [name for name, rows in given.items() if not hasattr(rows, "__len__")]
    if streams:
        raise ValueError(
            f"the data of clients {streams[:3]} are streaming datasets: the average is weighted by the number of "
            "examples, and every round trains on its own. Load them without streaming=True."
        )
    empty = [name for name, rows in given.items() if len(rows) == 0]
    if empty:
        raise ValueError(f"clients without examples: {empty[:3]}. Leave them out.")
    return {str(name): rows for name, rows in given.items()}


def _privacy_by_client(given: Any, names: list[str], federation: FedSVDConfig) -> dict[str, DPConfig] | None:
    """Return the configuration of every client; with a known seed each gets another, or their noise would cancel."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        lacking = sorted(set(names) ^ set(given))
        if lacking:
            raise ValueError(
                f"dp_config must name the clients exactly; differing: {lacking[:3]}. One client without noise would "
                "make the adapter not private."
            )
        return dict(given)
    if not isinstance(given, DPConfig):
        raise TypeError(f"dp_config must be a DPConfig or a dict of them by client, got {type(given).__name__}.")
    if given.secret_file is not None or given.ledger_file is not None:
        raise ValueError(
            "dp_config names one secret_file or ledger_file for all clients: each needs its own, or their noise and "
            "their budgets would be shared. Leave them out (every dataset has its own by default), or give a dict of "
            "configurations by client."
        )
    if given.unsafe_seed is None:
        return dict.fromkeys(names, given)
    return {
        name: replace(given, unsafe_seed=layer_seed(federation.federation_seed, name, given.unsafe_seed) % 2**31)
        for name in names
    }
