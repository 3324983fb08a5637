"""The course of a private run: start, resume, budget, checkpoints, and what is written beside the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainerCallback

from hfnoise.errors import CheckpointError
from hfnoise.privacy.adam_bias_correction import DPAdamBC
from hfnoise.privacy.ledger import Ledger
from hfnoise.privacy.secret_file import load_or_create_secret, secret_name, unsafe_secret
from hfnoise.trainers.checkpoints import last_complete_checkpoint
from hfnoise.trainers.private_dataset import privacy_folder
from hfnoise.trainers.private_metrics import PrivacyLog
from hfnoise.trainers.private_noise import bands_for
from hfnoise.trainers.private_result import check_result
from hfnoise.trainers.private_run import ROW_UNITS, UNSAFE, PrivateRun, RunState, new_run_id, now, plan_run
from hfnoise.trainers.private_settings import built_settings, step_settings

logger = logging.getLogger(__name__)


class BudgetStop(TrainerCallback):
    """Ends the training before the first step that the budget does not allow."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop when the next step would exceed the budget."""
        run = self._trainer.private_run
        if state.global_step >= run.limit and state.global_step < state.max_steps:
            logger.warning(
                "training stops at step %d of %d: one more would exceed target_epsilon=%s.",
                state.global_step, state.max_steps, run.state.target_epsilon,
            )  # fmt: skip
            control.should_training_stop = True
        return control


class PrivateCourseMixin:
    """The parts of [`DPTrainerMixin`] that concern the run as a whole."""

    args: Any
    state: Any
    model: Any
    accelerator: Any
    dp_config: Any
    fingerprint: str
    expected_batch_size: int
    _micro_batch_size: int
    _built_settings: dict[str, Any]
    train_dataset: Any
    data_collator: Any
    callback_handler: Any
    model_init: Any
    _units: Any
    _run: PrivateRun | None = None
    _in_the_weights: list[list[Any]] = []
    _recorder: Any = None
    _step: Any = None
    _before: dict[str, Tensor]
    _privacy_log: PrivacyLog

    planned_steps: Callable[[], int]
    is_world_process_zero: Callable[[], bool]

    def _begin_course(self) -> None:
        """Check what needs no data yet: files, delta; and watch the budget."""
        config = self.dp_config
        units = self._units.count
        self.target_delta = config.target_delta or min(1e-5, 1.0 / (10 * units))
        if self.target_delta >= 1.0 / units:
            logger.warning(
                "target_delta=%g is not below 1 / units = %g: releasing one unit at random would satisfy such a "
                "guarantee. Use less, for example %g.", self.target_delta, 1.0 / units, 1.0 / (10 * units),
            )  # fmt: skip
        if config.unsafe_seed is None:
            folder = privacy_folder(self.fingerprint)
            self._secret_file = Path(config.secret_file or folder / "secret").expanduser()
            default_ledger = self._secret_file.with_name("ledger.json")
        else:  # nothing is protected, so nothing is spent of a budget that counts
            default_ledger = Path(self.args.output_dir) / "unsafe_ledger.json"
        self._ledger_file = Path(config.ledger_file or default_ledger).expanduser()
        output = Path(self.args.output_dir).expanduser().resolve()
        if config.unsafe_seed is None and output in self._ledger_file.resolve().parents:
            raise ValueError(
                f"ledger_file={str(self._ledger_file)!r} lies in output_dir={self.args.output_dir!r}, which is pushed "
                "and deleted with the run: what was released would be forgotten, and later runs would claim too small "
                "an epsilon. Put it beside the data."
            )
        self._secret()  # refuses a bad file now
        # Steps that are done again with other settings are other releases, and with the same noise their difference
        # would be free of noise: such a run gets a key of its own and is charged again.
        self._built_settings = built_settings(self)
        self._built_dataset = self.train_dataset
        self.add_callback(BudgetStop(self))  # type: ignore[attr-defined]

    def _secret(self) -> bytes:
        """Return the secret of the noise; the main process reads it and tells the others."""
        if self.dp_config.unsafe_seed is not None:
            return unsafe_secret(self.dp_config.unsafe_seed)
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found = [load_or_create_secret(self._secret_file, self.args.output_dir), None]
            except (ValueError, OSError) as error:
                found = [None, error]
        return self._from_main_process(found)

    def _from_main_process(self, found: list[Any]) -> Any:
        """Return what the main process found, or raise its error, on every process."""
        value, error = broadcast_object_list(found)
        if error is not None:
            # One of the two, whatever it was; its own traceback would only be printed before this one.
            kind = CheckpointError if isinstance(error, CheckpointError) else ValueError
            raise kind(str(error)) from None
        return value

    @property
    def private_run(self) -> PrivateRun:
        """The run in progress, or one planned with these settings."""
        if self._run is None:
            self._start_run(None)
        assert self._run is not None
        return self._run

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise in units of `clip_norm`."""
        return self.private_run.state.noise_multiplier

    def epsilon(self) -> float:
        """Return epsilon of the weights as they are, at `target_delta`: of this run, or of the search that it won.

        It is that of the lineage: every step whose result is in these weights, also those before a branch; as
        `lineage_epsilon` in `privacy_report()`. There `total_epsilon` is of everything on the ledger of the dataset,
        and `epsilon` what the report states: the former, but of a branch the latter, since whoever branched off may
        have done so because of what the other steps of the run had shown.
        """
        tuning = getattr(self, "tune_result", None)
        return tuning["epsilon"] if tuning is not None else self.private_run.epsilon(self.state.global_step)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, privately; `resume_from_checkpoint=True` takes the newest whole checkpoint.

        Raises:
            ValueError: if the budget of the dataset is spent, or the checkpoint is not one of this run.
        """
        if not self._is_private:  # type: ignore[attr-defined]
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        self._refuse_to_go_on()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        self._start_run(str(resume_from_checkpoint) if resume_from_checkpoint else None)
        self._before = {}
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._end_private_steps()
            if self.model_init is None:  # else each training starts from a model of its own
                self._in_the_weights = self.private_run.released()
        rates = [entry["learning_rate"] for entry in self.state.log_history if "learning_rate" in entry]
        check_result(self.model, self._before, rates or [self.args.learning_rate])
        if self.dp_config.log_private_metrics:
            return output
        metrics = {name: value for name, value in output.metrics.items() if name != "train_loss"}
        return output._replace(training_loss=float("nan"), metrics=metrics)

    def _refuse_to_go_on(self) -> None:
        """Raise ValueError where the Trainer is no longer the one that the guarantee was worked out for."""
        if self.train_dataset is not self._built_dataset:
            raise ValueError(
                "train_dataset was replaced after the Trainer was built: the units, the sample rate and the ledger "
                "belong to the other one, so epsilon would be false. Build a new Trainer for this dataset."
            )
        if getattr(self, "tune_result", None) is not None:
            raise ValueError(
                "this Trainer won a dp_tune search: the epsilon of a search is that of its runs as they are, and "
                "further steps are not in it. Build a new Trainer, which is charged by itself."
            )

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: its trials are chosen by the results of earlier ones and none of them is accounted for."""
        raise ValueError(
            "hyperparameter_search tries settings on private data, chooses the next ones by the results and reports "
            "all of them: its epsilon would be that of all trials together, and adaptive. Use hfnoise.dp_tune, whose "
            "bound holds for a random number of trials of which only the best is released."
        )

    def _start_run(self, checkpoint: str | None) -> None:
        """Make the run that `train()` is about to take: a new one, the one of a checkpoint, or a branch of it."""
        secret = self._secret()
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found = [self._plan(secret, checkpoint), None]
            except (ValueError, OSError) as error:
                found = [None, error]
        state, limit = self._from_main_process(found)
        ledger = self._ledger() if self.accelerator.is_main_process else None
        self._run = PrivateRun(state, secret, ledger, limit)

    def _ledger(self) -> Ledger:
        return Ledger(self._ledger_file, self.fingerprint)

    def _plan(self, secret: bytes, checkpoint: str | None) -> tuple[RunState, int]:
        config = self.dp_config
        state = self._described(secret)
        if checkpoint is None and config.unsafe_seed is not None and config.ledger_file is None:
            self._ledger_file.unlink(missing_ok=True)  # what a test released before spends nothing
        ledger = self._ledger()
        if checkpoint is None:
            # A second train() goes on from the weights of the first: what they depend on is in them still.
            state = replace(state, bands=bands_for(config, state, ledger), earlier=self._in_the_weights)
            return plan_run(state, ledger, config.noise_multiplier)
        old = RunState.read(checkpoint)
        old.refuse_other_mechanism(state, checkpoint)
        branches = self._branches(old, state)
        if not branches:
            sigma = old.noise_multiplier
            state = replace(old, target_epsilon=config.target_epsilon, planned_steps=self.planned_steps())
            return plan_run(state, ledger, sigma, old.global_step)
        if config.noise == "banded":
            raise CheckpointError(
                f"resuming with other settings ({branches}) is not possible with noise='banded': its noise belongs to "
                "one course of steps. Resume with the settings of the checkpoint, or start a new run."
            )
        logger.warning(
            "resuming with other settings (%s): the steps after step %d are another release, with noise of their own, "
            "and are charged in addition to those already on the ledger.", branches, old.global_step,
        )  # fmt: skip
        state = replace(state, first_step=old.global_step, earlier=old.released(old.global_step))
        # The noise of the checkpoint goes on; the budget decides how many steps of it are left.
        sigma = old.noise_multiplier if config.noise_multiplier is None else config.noise_multiplier
        return plan_run(state, ledger, sigma, old.global_step)

    def _branches(self, old: RunState, here: RunState) -> str:
        """Return what makes the steps from here on another release than those of the checkpoint's run."""
        found = [
            f"{name}: {old.settings.get(name)!r} there, {value!r} here"
            for name, value in here.settings.items()
            if old.settings.get(name) != value
        ]
        if old.secret != here.secret:
            found.append("the secret of the checkpoint's run is gone")
        if self.dp_config.noise_multiplier not in (None, old.noise_multiplier):
            found.append(f"noise_multiplier: {old.noise_multiplier} there, {self.dp_config.noise_multiplier} here")
        if self.dp_config.bands not in ("auto", old.bands) and old.noise == "banded":
            found.append(f"bands: {old.bands} there, {self.dp_config.bands} here")
        return "; ".join(found)

    def _described(self, secret: bytes) -> RunState:
        """Return the state of a new run with these settings; its noise multiplier is still open."""
        config = self.dp_config
        seed = config.unsafe_seed
        what = ROW_UNITS[hasattr(self, "ref_model")]
        return RunState(
            run_id=new_run_id(),
            secret=secret_name(secret) if seed is None else f"{UNSAFE} {seed}",
            fingerprint=self.fingerprint,
            units=self._units.count,
            unit=what if config.unit_column is None else f"all rows with one value of {config.unit_column!r}",
            expected_batch_size=self.expected_batch_size,
            noise_multiplier=0.0 if config.noise_multiplier is None else config.noise_multiplier,
            delta=self.target_delta,
            target_epsilon=config.target_epsilon,
            clip_norm=config.clip_norm,
            clipping=config.clipping,
            noise=config.noise,
            bands=1,
            accountant=config.accountant,
            max_rows_per_unit=config.max_rows_per_unit,
            first_step=0,
            planned_steps=self.planned_steps(),
            started=now(),
            settings=self._built_settings | step_settings(self.args, config, self._micro_batch_size),
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer as the Trainer does; with `adam_bias_correction` it is [`DPAdamBC`]."""
        if self._is_private and self.dp_config.adam_bias_correction and self.optimizer is None:  # type: ignore[attr-defined]
            state, training = self.private_run.state, self.args
            self.optimizer_cls_and_kwargs = (
                DPAdamBC,
                {
                    "noise_variance": (state.noise_multiplier * state.clip_norm / state.expected_batch_size) ** 2,
                    "lr": training.learning_rate,
                    "betas": (training.adam_beta1, training.adam_beta2),
                    "eps": training.adam_epsilon,
                },
            )
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def _end_private_steps(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = self._step = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the ledger and the state of the run before the checkpoint that they belong to."""
        if self._is_private and self.is_world_process_zero():  # type: ignore[attr-defined]
            self.private_run.charge(self.state.global_step)
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
            self.private_run.state.write(folder, self.state.global_step)
            self._privacy_log.log()  # before the Trainer saves its history
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
