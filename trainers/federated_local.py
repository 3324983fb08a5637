"""A client's part of a round on any HF Trainer: some steps from where the server is, with an optimizer of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import Trainer

from hfnoise.privacy.accounting import Mechanism, composed_epsilon
from hfnoise.privacy.calibration import calibrate_noise_multiplier
from hfnoise.trainers.private_mixin import DPTrainerMixin
from hfnoise.trainers.private_run import SPENT

# Seeds of rounds must differ between rounds and clients, and be known beforehand; any large odd numbers do.
_ROUND_STRIDE = 1_000_003
# A budget holds if it is exceeded by no more than the root search of the calibration may leave.
_ROUNDING = 1e-6
# Of DPConfig.
_LARGEST_DEFAULT_DELTA = 1e-5


class SpentBudgetError(ValueError):
    """One more round would exceed a client's `target_epsilon`."""


class LocalTraining:
    """Local steps of one Trainer, again and again: a new optimizer, schedule and data order for every round.

    Formal guarantee: with a private Trainer every round is a run of its own on the ledger of the client's dataset,
    with a key of its own. The noise is calibrated once, to `local_steps` x `participations` steps, however many
    rounds there will be; the epsilon of a client is that of its whole ledger.

    Args:
        trainer (`transformers.Trainer`): built on the client's data, private or not; not trained yet.
        local_steps (`int`): optimizer steps in a round.
        participations (`int`): rounds at most.
        noise_multiplier (`float`, *optional*): of earlier rounds, after a restart; else calibrated when first needed.

    Raises:
        TypeError, ValueError: for something that is no Trainer, has an optimizer from outside, or has no rows.
    """

    def __init__(
        self, trainer: Any, local_steps: int, participations: int, noise_multiplier: float | None = None
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"a client needs a built transformers.Trainer, got {type(trainer).__name__}.")
        if trainer.optimizer is not None:
            raise ValueError(
                "the Trainer was built with an optimizer (optimizers=...), whose state would go on over rounds, for "
                "factors that the server has rotated. Name it by optim=... in the arguments instead."
            )
        if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
            raise ValueError("a client needs a train_dataset with a length: streams have no number of examples.")
        if len(trainer.train_dataset) == 0:
            raise ValueError("a client has no examples: it would train on nothing and be averaged all the same.")
        self.trainer, self.local_steps, self.participations = trainer, local_steps, participations
        trainer.args = copy.copy(trainer.args)  # the caller's stay as they are
        trainer.args.max_steps = local_steps
        trainer.args.save_strategy, trainer.args.eval_strategy = "no", "no"
        trainer.args.load_best_model_at_end = False
        self._seed = trainer.args.seed
        self._config = trainer.dp_config if self.is_private else None
        self._noise_multiplier = noise_multiplier
        self._refuse_bands()
        # The Trainer alone would begin an unsafe ledger anew in every round, and epsilon would be that of the last.
        self._has_passing_ledger = (
            self._config is not None and self._config.unsafe_seed is not None and self._config.ledger_file is None
        )

    @property
    def is_private(self) -> bool:
        """Whether the Trainer clips and adds noise."""
        return isinstance(self.trainer, DPTrainerMixin)

    @property
    def examples(self) -> int:
        """Number of rows, n_k."""
        return len(self.trainer.train_dataset)

    @property
    def delta(self) -> float | None:
        """Delta of a private client."""
        return float(self.trainer.target_delta) if self.is_private else None

    @property
    def stated_delta(self) -> float | None:
        """A delta that tells nothing of the number of units, and at which the same epsilon holds a fortiori.

        The default, min(1e-5, 1 / (10 units)), is the number of units of whoever has more than 10,000.
        """
        if self._config is None or self._config.target_delta is not None:
            return self.delta
        return max(_LARGEST_DEFAULT_DELTA, float(self.trainer.target_delta))

    @property
    def noise_multiplier(self) -> float | None:
        """Of a private client: given, or calibrated to its budget and all rounds that it may take part in.

        Raises:
            SpentBudgetError: if other runs on the same data have left nothing of the budget.
        """
        if self._config is None:
            return None
        if self._config.noise_multiplier is not None:
            return float(self._config.noise_multiplier)
        if self._noise_multiplier is None:
            self._refuse_spent()
            try:
                self._noise_multiplier = calibrate_noise_multiplier(
                    self._config.target_epsilon,
                    self.trainer.target_delta,
                    self.trainer.sample_rate,
                    self.local_steps * self.participations,
                    spent=tuple(self.trainer._ledger().mechanisms()),
                    accountant=self._config.accountant,
                )
            except ValueError as error:  # other runs on these data have left nothing
                raise SpentBudgetError(f"{error} The ledger is {str(self.trainer._ledger_file)!r}.") from error
        return self._noise_multiplier

    def _refuse_spent(self) -> None:
        # What is left of a spent budget calibrates to noise that nothing survives: DPSFTTrainer refuses it as well.
        assert self._config is not None  # of private clients only
        budget, spent = float(self._config.target_epsilon), self.epsilon()
        if spent is not None and spent > SPENT * budget:
            raise SpentBudgetError(
                f"target_epsilon={budget:g} is spent: other runs on these data have released epsilon={spent:.4g} "
                f"(ledger {str(self.trainer._ledger_file)!r}). Raise target_epsilon to what you accept in all."
            )

    def keep_ledger(self, file: Path | None = None) -> None:
        """Write the ledger of a Trainer with `unsafe_seed` into a file that lasts; real secrets have their own.

        Args:
            file (`Path`, *optional*): it goes on from what is there; by default the Trainer's own, emptied now, for
                as long as this object lives.
        """
        if self._config is None or not self._has_passing_ledger:
            return
        if file is None:
            file = self.trainer._ledger_file
            file.unlink(missing_ok=True)
        self._config = replace(self._config, ledger_file=str(file))
        self.trainer.dp_config, self.trainer._ledger_file = self._config, file

    def epsilon(self, more_steps: int = 0) -> float | None:
        """Return epsilon of everything on the client's ledger, and of some more steps; None without privacy."""
        if self._config is None:
            return None
        mechanisms = list(self.trainer._ledger().mechanisms())
        if more_steps:
            mechanisms.append(Mechanism(self.trainer.sample_rate, float(self.noise_multiplier or 0.0), more_steps))
        return composed_epsilon(mechanisms, self.trainer.target_delta, self._config.accountant)

    def require_budget(self) -> None:
        """Raise SpentBudgetError if the steps of one more round exceed the budget, before anything is trained."""
        if self._config is None or self._config.target_epsilon is None:
            return
        after = self.epsilon(self.local_steps)
        if after is not None and after > self._config.target_epsilon * (1 + _ROUNDING):
            raise SpentBudgetError(
                f"target_epsilon={self._config.target_epsilon:g} is spent: after one more round of {self.local_steps} "
                f"steps the ledger {str(self.trainer._ledger_file)!r} would stand at {after:.4g}. Other runs on these "
                "data are on it too. Take this client out of the federation."
            )

    def _refuse_bands(self) -> None:
        config = self._config
        if config is not None and config.noise == "banded" and config.target_epsilon is not None:
            raise ValueError(
                "noise='banded' begins anew in every round, with bands of its own, and target_epsilon cannot be kept "
                "over rounds with it: the noise of a federation is calibrated to all rounds together. Use "
                "noise='gaussian'; or give noise_multiplier and a number of bands, the ledger then says what it comes "
                "to."
            )

    def run(self, round: int) -> None:
        """Train for the steps of a round, from the weights that are in the model."""
        trainer, args = self.trainer, self.trainer.args
        seed = (self._seed + _ROUND_STRIDE * (round + 1)) % 2**31
        args.seed = args.data_seed = seed
        # What the Trainer would otherwise take over from the last round.
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.model_wrapped = trainer.model
        trainer._created_lr_scheduler = False
        with self._as_one_run(seed):
            trainer.train()
        trainer.optimizer = trainer.lr_scheduler = None

    @contextmanager
    def _as_one_run(self, seed: int) -> Iterator[None]:
        """Let a private Trainer use the noise of the whole federation, instead of spending the budget in a round."""
        if self._config is None:
            yield
            return
        config = replace(self._config, target_epsilon=None, noise_multiplier=self.noise_multiplier)
        if config.unsafe_seed is not None:  # else the same draws in every round
            config = replace(config, unsafe_seed=(config.unsafe_seed + seed) % 2**31)
        self.trainer.dp_config = config
        try:
            yield
        finally:
            self.trainer.dp_config = self._config
