"""dp_tune: a hyper-parameter search whose own cost in privacy is known; of all its runs only the best is released."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hfnoise.privacy.accounting import Mechanism, Search, composed_epsilon
from hfnoise.privacy.keyed_random import KeyedRandom
from hfnoise.privacy.ledger import Ledger, LedgerEntry
from hfnoise.privacy.secret_file import run_key, unsafe_secret
from hfnoise.privacy.trial_counts import trial_count
from hfnoise.privacy.tuning import calibrate_search_noise
from hfnoise.trainers.private_metrics import PrivacyLog
from hfnoise.trainers.private_run import RunState, new_run_id, now, refuse_other_units

logger = logging.getLogger(__name__)

Candidate = dict[str, Any]

# What all candidates must share: the bound is for runs of one mechanism.
_SHARED = (
    "fingerprint", "units", "unit", "expected_batch_size", "noise_multiplier", "delta", "noise", "bands",
    "max_rows_per_unit", "planned_steps",
)  # fmt: skip


@dataclass(frozen=True)
class TuneResult:
    """The winner of a search, and the guarantee of the whole search; see [`dp_tune`].

    Args:
        candidate (`dict`, *optional*): the chosen hyper-parameters; `None` if a Poisson number of runs was 0.
        score (`float`): of the winner. It is a function of the validation data: publish it only if that is public.
        epsilon (`float`), delta (`float`): of the search, and so of everything in this object.
        total_epsilon (`float`): of everything on the ledger of the dataset, this search included.
        run_epsilon (`float`): what one run alone would have had. No guarantee of the winner: it was chosen.
        expected_trials (`float`), eta (`float`), distribution (`str`): the law of the number of runs, which itself
            stays secret.
        trainer: of the winner, trained; save it with `trainer.save_model()`, and do not train it further.
    """

    candidate: Candidate | None
    score: float
    epsilon: float
    delta: float
    total_epsilon: float
    run_epsilon: float
    expected_trials: float
    eta: float
    distribution: str
    trainer: Any = field(repr=False, compare=False, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the guarantee, for reports and cards: without the score, which the validation data is in."""
        names = ("epsilon", "delta", "total_epsilon", "run_epsilon", "expected_trials", "eta", "distribution")
        return {name: getattr(self, name) for name in names}


def dp_tune(
    make_trainer: Callable[[Candidate], Any],
    space: Mapping[str, Sequence[Any] | Callable[[Random], Any]],
    score: Callable[[Any], float],
    *,
    expected_trials: float,
    eta: float = 0.0,
    distribution: str = "negative_binomial",
    unsafe_seed: int | None = None,
) -> TuneResult:
    """Return the best of a secret random number of private trainings (Papernot & Steinke, arXiv 2110.03620).

    The number of runs K is drawn from a known law; K times a candidate is drawn from `space`, each value independently
    and uniformly, and the whole private training is run; the one with the best score is kept (of equal ones a random
    one). Nothing else survives: the weights and scores of the others are dropped, no run prints, reports to a tracker,
    pushes or saves, and K is neither returned nor logged. What still tells K apart is how long the search took: keep
    that, and the output of your own callbacks, to yourself.

    Formal guarantee: the result is (`epsilon`, `delta`)-differentially private by theorem 2 (truncated negative
    binomial) or 6 (Poisson) of the paper, if `score` is a function of what a run releases and of data that this
    guarantee need not cover: public validation data. A score on private validation rows releases something of them.
    Take rows that are disjoint from the training data, and the guarantee of the training rows stands; the validation
    rows then have none, unless the score itself is made private. A score on the training rows voids it.
    All candidates must be runs of one mechanism (batch size, noise multiplier, steps, unit); others are refused by
    name. What may vary: learning rate, clip_norm, optimizer, schedule, LoRA rank, and all else that is not private.

    On the ledger of the dataset the search is one entry, written before the first run begins. With
    `DPConfig(target_epsilon=...)` that budget is the one of the whole search together with what is on the ledger, and
    all runs get the noise multiplier that follows; with `noise_multiplier` epsilon follows.

    `Trainer.hyperparameter_search` is no substitute: a fixed number of trials, chosen by earlier results, and all of
    them shown.

    Args:
        make_trainer (`Callable[[dict], Trainer]`): builds a private Trainer for a candidate, with a model of its own.
        space (`dict`): for each hyper-parameter a list of values, or a function of a `random.Random` that draws one,
            such as `lambda random: 10 ** random.uniform(-4, -2)`.
        score (`Callable[[Trainer], float]`): higher is better; NaN counts as the worst.
        expected_trials (`float`): mean of K, at least 1.
        eta (`float`, defaults to 0.0): above -1; -0.5 costs the least and draws K = 1 in half of all searches; 1 is a
            geometric K.
        distribution (`str`, defaults to `"negative_binomial"`): or `"poisson"`, where K may be 0 and the result empty.
        unsafe_seed (`int`, *optional*): a K and candidates that anybody can recompute, for tests.

    Returns:
        [`TuneResult`]

    Raises:
        TypeError, ValueError: for an empty space, a law that does not exist, a Trainer that is not private, candidates
            of different mechanisms, a spent budget, or settings that would show the losers.
        RuntimeError: if the weights of all runs became infinite.

    Example:
        >>> from hfnoise import dp_tune
        >>> dp_tune(lambda candidate: None, {"learning_rate": []}, lambda trainer: 0.0, expected_trials=10)
        Traceback (most recent call last):
        ...
        ValueError: space['learning_rate'] is empty; give a list of values, or a function of a random.Random.
    """
    _check_space(space)
    law = trial_count(expected_trials, eta, distribution)
    key = run_key(_secret(unsafe_seed), "search")
    secret, draws = KeyedRandom(key), Random(key)  # K and ties are secret; candidates need only be independent
    trials = law.sample(float(secret.uniforms("number of trials", 0, 1)))
    hunt = _Hunt(make_trainer, score, Search(Mechanism(1.0, 1.0, 0), expected_trials, eta, distribution), secret)
    with tempfile.TemporaryDirectory() as folder:
        if trials == 0:  # on the ledger all the same: what is not there would tell
            hunt.charge(hunt.prepare(_draw(space, draws), Path(folder) / "0")[0])
        for trial in range(trials):
            hunt.run(_draw(space, draws), Path(folder) / str(trial))
        return hunt.result(nothing=trials == 0)


@dataclass
class _Settings:
    """What a trial changes in a Trainer, so that the winner gets it back."""

    output_dir: str
    ledger_file: Path
    callbacks: list[Any]


class _Hunt:
    """The trials of a search; knows the best one so far and nothing of the others."""

    def __init__(
        self, make: Callable[[Candidate], Any], score: Callable[[Any], float], law: Search, secret: KeyedRandom
    ):
        self._make, self._score, self._law, self._secret = make, score, law, secret
        self._first: RunState | None = None
        self._entry: LedgerEntry | None = None
        self._noise_multiplier: float | None = None
        self._ledger: Ledger | None = None
        self._best: tuple[float, Candidate, Any, _Settings] | None = None
        self._ties = 0

    def prepare(self, candidate: Candidate, folder: Path) -> tuple[Any, _Settings]:
        """Return a Trainer that writes nothing anybody sees, of the mechanism of the others, and what was changed."""
        trainer = self._make(dict(candidate))
        _refuse(trainer)
        ledger = Ledger(trainer._ledger_file, trainer.fingerprint)
        settings = _Settings(trainer.args.output_dir, trainer._ledger_file, list(trainer.callback_handler.callbacks))
        _hide(trainer, folder)
        self._set_noise(trainer, ledger)
        trainer._run = None
        state: RunState = trainer.private_run.state
        if self._first is None:
            refuse_other_units(state, ledger)
            self._first, self._ledger = state, ledger
            self._law = replace(self._law, mechanism=state.mechanism(state.planned_steps))
        self._refuse_other(state, candidate)
        return trainer, settings

    def run(self, candidate: Candidate, folder: Path) -> None:
        """Train one candidate; keep it if it is the best so far."""
        trainer, settings = self.prepare(candidate, folder)
        self.charge(trainer)
        value = -math.inf
        try:
            trainer.train()
            value = float(self._score(trainer))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Weights that became infinite are an outcome like others: to stop here would tell of the data.
            if "is not finite" not in str(error):
                raise
        if math.isnan(value):
            value = -math.inf
        (value,) = broadcast_object_list([value])  # all processes keep the same run
        self._keep(value, candidate, trainer, settings)

    def _keep(self, value: float, candidate: Candidate, trainer: Any, settings: _Settings) -> None:
        if value == -math.inf:
            return
        if self._best is None or value > self._best[0]:
            self._best, self._ties = (value, candidate, trainer, settings), 1
        elif value == self._best[0]:
            self._ties += 1
            # Each of the equal ones with the same probability.
            if float(self._secret.uniforms("ties", self._ties, 1)) * self._ties < 1:
                self._best = (value, candidate, trainer, settings)

    def _set_noise(self, trainer: Any, ledger: Ledger) -> None:
        """Replace a budget by the noise with which the whole search keeps it."""
        config = trainer.dp_config
        if config.target_epsilon is None:
            return
        if self._noise_multiplier is None:
            found: list[Any] = [None, None]
            if trainer.accelerator.is_main_process:
                try:
                    steps = trainer.planned_steps()
                    bands = config.bands if config.noise == "banded" else 1
                    law = replace(self._law, mechanism=Mechanism(trainer.sample_rate, 1.0, steps, bands))
                    noise = calibrate_search_noise(
                        config.target_epsilon, trainer.target_delta, law, spent=tuple(ledger.mechanisms()),
                        accountant=config.accountant,
                    )  # fmt: skip
                    found = [noise, None]
                except ValueError as error:
                    found = [None, error]
            self._noise_multiplier = trainer._from_main_process(found)
        trainer.dp_config = replace(config, target_epsilon=None, noise_multiplier=self._noise_multiplier)

    def _refuse_other(self, state: RunState, candidate: Candidate) -> None:
        assert self._first is not None
        differing = [name for name in _SHARED if getattr(state, name) != getattr(self._first, name)]
        if differing:
            listed = ", ".join(
                f"{name}: {getattr(self._first, name)!r} and {getattr(state, name)!r}" for name in differing
            )
            raise ValueError(
                f"candidates are runs of different mechanisms ({listed}; now {candidate}): the epsilon of a search "
                "holds for runs of one noise multiplier, sample rate and number of steps, and would be false here. "
                "Let other hyper-parameters vary (learning rate, clip_norm, rank, schedule). Nothing is released."
            )

    def charge(self, trainer: Any) -> None:
        """Write the whole search into the ledger of the dataset, before its first step."""
        if self._entry is not None or not trainer.is_world_process_zero():
            return
        state, ledger = self._first, self._ledger
        assert state is not None and ledger is not None
        self._entry = LedgerEntry(
            run_id=new_run_id(), sample_rate=state.sample_rate, noise_multiplier=state.noise_multiplier,
            steps=state.planned_steps, bands=state.bands, unit=state.unit, started=now(), secret=state.secret,
            expected_trials=float(self._law.expected_trials), eta=float(self._law.eta),
            distribution=self._law.distribution,
        )  # fmt: skip
        ledger.charge(self._entry)

    def result(self, nothing: bool) -> TuneResult:
        """Return the winner, with the settings that it was built with."""
        state, ledger = self._first, self._ledger
        assert state is not None and ledger is not None
        if self._best is None and not nothing:
            raise RuntimeError(
                "no candidate gave a finite score: weights or scores of all runs became infinite or NaN. The search "
                "is on the ledger. Use smaller learning rates, and try them on public data first."
            )
        value, candidate, trainer, settings = self._best or (-math.inf, None, None, None)
        result = TuneResult(
            candidate=candidate,
            score=value,
            epsilon=self._law.epsilon(state.delta),
            delta=state.delta,
            total_epsilon=composed_epsilon(ledger.mechanisms(), state.delta, state.accountant),
            run_epsilon=composed_epsilon([self._law.mechanism], state.delta, state.accountant),
            expected_trials=float(self._law.expected_trials),
            eta=float(self._law.eta),
            distribution=self._law.distribution,
            trainer=trainer,
        )
        if trainer is not None and settings is not None:
            trainer.args.output_dir, trainer._ledger_file = settings.output_dir, settings.ledger_file
            trainer.callback_handler.callbacks = settings.callbacks
            trainer.private_run.ledger = ledger
            trainer.tune_result = result.to_dict()
        return result


def _check_space(space: Any) -> None:
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"space must be a dict with a list of values for each hyper-parameter, got {space!r}.")
    for name, values in space.items():
        if callable(values):
            continue
        if not isinstance(values, Sequence) or isinstance(values, str) or not len(values):
            what = "is empty" if isinstance(values, Sequence) and not len(values) else f"is {values!r}"
            raise ValueError(f"space[{name!r}] {what}; give a list of values, or a function of a random.Random.")


def _secret(unsafe_seed: int | None) -> bytes:
    """Return 32 bytes that nobody else knows, the same on every process."""
    secret = os.urandom(32) if unsafe_seed is None else unsafe_secret(unsafe_seed)
    found: list[bytes] = broadcast_object_list([secret])
    return found[0]


def _draw(space: Mapping[str, Any], draws: Random) -> Candidate:
    return {
        name: values(draws) if callable(values) else values[draws.randrange(len(values))]
        for name, values in space.items()
    }


def _refuse(trainer: Any) -> None:
    """Raise ValueError for what would show the losers, or has no guarantee to start from."""
    if not getattr(trainer, "_is_private", False):
        raise ValueError(
            f"make_trainer must return a private Trainer, got {type(trainer).__name__}: the best of several trainings "
            "on private data has no guarantee unless each has one. Use DPTrainer, DPSFTTrainer, DPDPOTrainer or "
            "make_private."
        )
    args, config = trainer.args, trainer.dp_config
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub=True would publish every candidate; the bound is for the best one alone. Push the winner: "
            "result.trainer.push_to_hub()."
        )
    if args.load_best_model_at_end or str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
        raise ValueError(
            "load_best_model_at_end and save_strategy='best' choose among the steps of a run by evaluation, which the "
            "bound of a search does not count. Turn them off; the score chooses among whole runs."
        )
    if config.log_private_metrics:
        raise ValueError("log_private_metrics=True shows losses of every candidate. Turn it off in a search.")
    if config.noise_multiplier == 0:
        raise ValueError("noise_multiplier=0 gives no run a guarantee, and a search over such runs has none either.")
    if config.noise == "banded" and config.bands == "auto":
        raise ValueError("bands='auto' is chosen for a single run; give the number of bands for a search.")


def _hide(trainer: Any, folder: Path) -> None:
    """Let a trial write into a temporary folder, and print and report nothing."""
    built = Path(trainer.args.output_dir)
    if built.is_dir() and not any(built.iterdir()):
        built.rmdir()  # the Trainer made it; its name may tell the candidate
    folder.mkdir(parents=True, exist_ok=True)
    trainer.args.output_dir = str(folder)
    trainer._ledger_file = folder / "ledger.json"  # of this run alone; the search is charged as a whole
    trainer.args.save_strategy = type(trainer.args.save_strategy)("no")
    trainer.args.disable_tqdm = True
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if not _shows(callback)
    ]


def _shows(callback: Any) -> bool:
    trackers = type(callback).__module__.startswith("transformers.integrations")
    # Epsilon of a single run is not that of the search.
    return trackers or isinstance(callback, (PrinterCallback, ProgressCallback, PrivacyLog))
