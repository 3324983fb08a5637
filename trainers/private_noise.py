"""The noise of a private run: independent from step to step, or correlated so that sums of steps are less noisy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfnoise.privacy.calibration import calibrate_noise_multiplier
from hfnoise.privacy.correlated_noise import CorrelatedNoise, choose_bands
from hfnoise.privacy.ledger import Ledger
from hfnoise.privacy.toeplitz import toeplitz_strategy
from hfnoise.trainers.private_run import PrivateRun, RunState

logger = logging.getLogger(__name__)


def noise_source(run: PrivateRun, count: int) -> Callable[[int], Tensor]:
    """Return the function that gives the noise of a step, for `clip_norm * noise_multiplier` to be multiplied with.

    Correlated noise is x = C^-1 z with a banded C whose columns have norm 1. A unit takes part at most once in `bands`
    steps, so its columns do not overlap and the sensitivity is that of one step.

    Args:
        run ([`PrivateRun`]): whose keyed draws and planned steps it uses.
        count (`int`): numbers per step.

    Returns:
        `Callable[[int], Tensor[count]]`, float64.
    """

    def white(step: int) -> Tensor:
        return run.random.normals("noise", step, count)

    state = run.state
    if state.noise == "gaussian":
        return white
    strategy = toeplitz_strategy("banded", state.planned_steps, state.bands)
    return CorrelatedNoise(strategy, state.planned_steps, white, column_normalized=True).at


def bands_for(config: Any, state: RunState, ledger: Ledger) -> int:
    """Return the number of bands of a new run: 1, the given one, or the one of least error for the budget.

    Args:
        config ([`DPConfig`]): `noise` and `bands`.
        state ([`RunState`]): batch, units and steps of the run.
        ledger ([`Ledger`]): what is spent of the budget.

    Raises:
        ValueError: if `bands="auto"` has no budget to choose for, or there are more bands than units for them.
    """
    if config.noise == "gaussian":
        return 1
    most = min(state.units // state.expected_batch_size, state.planned_steps)
    if config.bands != "auto":
        if config.bands > most:
            raise ValueError(
                f"bands={config.bands} is more than {most}, the smaller of units / expected_batch_size and steps: a "
                "group of units would be smaller than the batch that is drawn from it. Use fewer, or 'auto'."
            )
        return int(config.bands)
    if config.target_epsilon is None:
        raise ValueError("bands='auto' chooses for a budget: give target_epsilon, or a number of bands.")
    spent = tuple(ledger.mechanisms())
    choice = choose_bands(
        state.expected_batch_size,
        state.units,
        state.planned_steps,
        lambda bands: calibrate_noise_multiplier(
            config.target_epsilon, state.delta, state.sample_rate, state.planned_steps,
            # Rényi accounting chooses the same bands in a fraction of the time; the run itself is calibrated anew.
            bands=bands, spent=spent, accountant="rdp",
        ),
    )  # fmt: skip
    ratio = next(option.ratio for option in choice.options if option.bands == choice.bands)
    logger.info("bands=%d: the error of sums of steps is %.2f of that with independent noise.", choice.bands, ratio)
    return choice.bands


def refuse_optimizer(args: Any, optimizer: Any, config: Any) -> None:
    """Raise ValueError if the optimizer would undo what the noise is shaped for.

    Args:
        args (`TrainingArguments`): `optim` and Adam's epsilon.
        optimizer (`torch.optim.Optimizer`, *optional*): given to the Trainer by the user.
        config ([`DPConfig`]): `noise` and `adam_bias_correction`.
    """
    name = str(getattr(args.optim, "value", args.optim))
    is_sgd = isinstance(optimizer, torch.optim.SGD) if optimizer is not None else name == "sgd"
    if config.noise == "banded" and not is_sgd:
        raise ValueError(
            f"noise='banded' with {type(optimizer).__name__ if optimizer is not None else f'optim={name!r}'}: single "
            "gradients are noisier and only their sums are better, but an optimizer that divides by the size of "
            "single gradients, as Adam does, sees the former. Use optim='sgd' (momentum through "
            "optim_args='momentum=0.9'), or noise='gaussian'."
        )
    if not config.adam_bias_correction:
        return
    if optimizer is not None or not name.startswith("adamw_torch"):
        raise ValueError(
            f"adam_bias_correction=True replaces the optimizer by DPAdamBC, which needs optim='adamw_torch' and no "
            f"optimizer of your own; got optim={name!r}."
        )
    if args.adam_epsilon < 1e-6:
        raise ValueError(
            f"adam_bias_correction=True with adam_epsilon={args.adam_epsilon:g}: where the noise exceeds the gradient "
            "the corrected second moment is near 0, and the step is divided by adam_epsilon. Set it to the size of a "
            "gradient coordinate, for example 1e-4."
        )
