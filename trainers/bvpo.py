"""BVPO: preference optimisation of reasoning models on sampled traces, mixed with answers without a trace."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hfnoise.methods import find_method
from hfnoise.option_types import check_option_types
from hfnoise.options import BVPO_OPTIONS
from hfnoise.preference.online_trace_alpha import MOMENTS, GradientSums, OnlineTraceAlpha
from hfnoise.trainers.noise_dpo import NoiseDPOTrainer
from hfnoise.trainers.noise_dpo_config import NoiseDPOConfig, option_field
from hfnoise.trainers.pair_batch import PairBatch
from hfnoise.trainers.trace_collator import DataCollatorForTracePreference
from hfnoise.trainers.trace_data import TraceDataMixin
from hfnoise.trainers.trace_probe import GradientProbe

__all__ = ["BVPOConfig", "BVPOTrainer", "DataCollatorForTracePreference"]

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclass
class BVPOConfig(NoiseDPOConfig):
    """Configuration for [`BVPOTrainer`]: [`NoiseDPOConfig`] with the share of the loss on traces.

    Args:
        trace_alpha (`float` or `"auto"`, defaults to `"auto"`): share of the loss with traces, in [0, 1]. 0.5, the
            paper's choice, is plain DPO on the union of both datasets; `"auto"` estimates the share of least gradient
            error from the gradients of every step.
        alpha_decay (`float`, defaults to `0.95`): decay of the moving averages behind `"auto"`, in [0, 1).
        alpha_min (`float`, defaults to `0.05`): `"auto"` stays in [alpha_min, 1 - alpha_min]; above 0, below 0.5: a
            gradient that has no share at all cannot be measured.
        alpha_every (`int`, defaults to `4`): optimizer steps between two estimates, at least 1. With `prefix_sharing`
            these steps run on padded rows.
        max_length (`int`, defaults to `4096`): of prompt and answer with its trace, the paper's; rows that exceed it
            are dropped and counted, not cut.

    Raises:
        ValueError: for any value out of range, or a step of one prompt with `"auto"`.

    Example:
        >>> from hfnoise import BVPOConfig
        >>> BVPOConfig("out", trace_alpha=0.3, use_cpu=True, bf16=False).max_length
        4096
    """

    trace_alpha: float | str | None = option_field("trace_alpha", AUTO, BVPO_OPTIONS)
    alpha_decay: float = option_field("alpha_decay", 0.95, BVPO_OPTIONS)
    alpha_min: float = option_field("alpha_min", 0.05, BVPO_OPTIONS)
    alpha_every: int = option_field("alpha_every", 4, BVPO_OPTIONS)
    max_length: int | None = option_field("max_length", 4096, BVPO_OPTIONS)

    def __post_init__(self) -> None:
        check_option_types(self, BVPOConfig)
        self.trace_alpha = _share(self.trace_alpha)
        if not 0 <= self.alpha_decay < 1:
            raise ValueError(f"alpha_decay must be in [0, 1), got {self.alpha_decay!r}.")
        if not 0 < self.alpha_min < 0.5:
            raise ValueError(f"alpha_min must be above 0 and below 0.5, got {self.alpha_min!r}.")
        if self.alpha_every < 1:
            raise ValueError(f"alpha_every must be at least 1 step, got {self.alpha_every!r}.")
        super().__post_init__()
        if self.trace_alpha == AUTO and self.torch_compile:
            raise ValueError(
                "trace_alpha='auto' reads gradients through hooks, which torch_compile=True leaves out. Give "
                "trace_alpha a number, or leave torch_compile out."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True changes the number of prompts that trace_alpha is estimated for. Set "
                "per_device_train_batch_size, and gradient_accumulation_steps for the rest of the batch."
            )
        if self.trace_alpha == AUTO and self.prompts_per_step < 2:
            raise ValueError(
                "trace_alpha='auto' estimates variances over the prompts of a step and needs at least 2, got "
                f"per_device_train_batch_size={self.per_device_train_batch_size}, gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} and {self.world_size} process(es). Raise the accumulation, or "
                "give a number."
            )

    @property
    def prompts_per_step(self) -> int:
        """Prompts in a whole optimizer step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def is_computed_by_trl(self, name: str) -> bool:
        """Return `False`: TRL's mean over the batch has no room for a share."""
        return False


def _share(value: Any) -> float | str:
    if isinstance(value, str) and value.strip().lower() == AUTO:
        return AUTO
    try:
        if isinstance(value, bool):
            raise ValueError
        share = float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError(
            f"trace_alpha must be a number in [0, 1] or 'auto', got {value!r}: 1 trains on traces alone, 0 on answers "
            "without traces alone, 0.5 is plain DPO on both."
        )
    return share


class TraceAlphaState(TrainerCallback, ExportableState):
    """Writes the running estimate of the share into every checkpoint."""

    def __init__(self, online: OnlineTraceAlpha | None = None) -> None:
        self.online = online or OnlineTraceAlpha()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"saved": self.online.state()}}


class BVPOTrainer(TraceDataMixin, NoiseDPOTrainer):
    """Trains with BVPO: alpha times the loss on answers with traces, 1 - alpha times that on answers without.

    BVPO (arXiv 2510.05095). A sampled trace makes the gradient noisy; the answers without traces, sampled apart, give
    a gradient without that noise and with a bias. The paper states the best share and trains with 0.5; here it is
    estimated while training from the gradients of single prompts, sketched as the backward pass goes by (see
    `hfnoise.trainers.trace_probe`), so it takes no pass of its own. Metrics give the two losses apart.

    Example:
        >>> from hfnoise import BVPOTrainer
        >>> BVPOTrainer._paper["id"]
        '2510.05095'
    """

    _method = find_method("bvpo")
    _tag_names = ["trl", *_method.tags]
    _name = "BVPO"
    _paper = {
        "title": "From Noisy Traces to Stable Gradients: Bias-Variance Optimized Preference Optimization for Aligning "
        "Large Reasoning Models",
        "id": _method.paper,
        "citation": _method.bibtex,
    }
    _config_class = BVPOConfig
    _purpose = "for a reasoning model, on answers with sampled traces and without"
    branches_per_prompt = 4
    _is_probing = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_auto = self.args.trace_alpha == AUTO
        fixed = 0.5 if self._is_auto else self.args.trace_alpha
        self.online_alpha = OnlineTraceAlpha(self.args.alpha_decay, self.args.alpha_min, alpha=fixed)
        self._sums = GradientSums()
        self._probe = GradientProbe(self.model) if self._is_auto else None
        if self._is_auto:
            self.add_callback(TraceAlphaState(self.online_alpha))
        logger.info("BVPO: trace_alpha=%s, losses %s", self.args.trace_alpha, self.args.loss_type)

    @property
    def trace_alpha(self) -> float:
        """The share of the loss with traces in the present step."""
        return self.online_alpha.alpha

    def run_identity(self) -> dict[str, Any]:
        """Return what must agree between a checkpoint and the run that resumes from it."""
        names = ("trace_alpha", "alpha_decay", "alpha_min", "alpha_every")
        return {**super().run_identity(), **{name: getattr(self.args, name) for name in names}}

    def restore_run_state(self, states: dict[str, Any]) -> None:
        """Take over the running estimate of a checkpoint."""
        if self._is_auto:
            self.online_alpha.load(states["TraceAlphaState"]["attributes"]["saved"])

    def _load_callback_state(self) -> None:
        """Let the callback that `restore_callback_states_from_checkpoint` makes anew write our estimate as well."""
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TraceAlphaState):
                callback.online = self.online_alpha

    def report(self) -> dict[str, Any]:
        """Return the share, how it was found, and the moments it follows from, for the card."""
        settings: dict[str, Any] = {"trace_alpha": self.args.trace_alpha}
        if self._is_auto and self.online_alpha.updates:
            moments = zip(MOMENTS, self.online_alpha.estimates(), strict=True)
            settings |= {"last_trace_alpha": round(self.trace_alpha, 4), "alpha_estimates": self.online_alpha.updates}
            settings |= {name: float(f"{value:.4g}") for name, value in moments}
        return {**super().report(), "settings": settings}

    def sharing_prefixes(self, model: Any) -> Any:
        """Return the model, or what shares its prefixes; not while gradients are sketched, which takes whole rows."""
        return model if self._is_probing else super().sharing_prefixes(model)

    def reduced_pair_losses(self, pairs: PairBatch, tap: Any) -> Tensor:
        """Return alpha times the mean loss with traces plus 1 - alpha times the mean without."""
        values = self.weighted_pair_values(self._pair_losses, pairs, pairs.margins)
        self._log_halves(pairs, values)
        trace, empty = values.chunk(2)
        alpha = self.trace_alpha
        # As a mean over all pairs, which with alpha = 0.5 is the one of DPO on the union, to the bit.
        return torch.cat([2 * alpha * trace, 2 * (1 - alpha) * empty]).mean()

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch; with the last of a step the share of the next one is estimated."""
        synchronised = self.accelerator.sync_gradients
        probe = self._probe if self.state.global_step % self.args.alpha_every == 0 else None
        self._is_probing = probe is not None
        try:
            with nullcontext() if probe is None else probe.listen():
                loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._is_probing = False
        if probe is not None:
            self._add_gradients(probe.take_pairs())
        if synchronised:
            self._estimate_alpha()
        return loss

    def _add_gradients(self, gradients: Tensor) -> None:
        """Add the sketches of a micro-batch, freed of the factors with which the losses entered the backward pass."""
        trace, empty = gradients.chunk(2)
        scaler = self.accelerator.scaler
        factor = (scaler.get_scale() if scaler is not None else 1.0) / self.current_gradient_accumulation_steps
        factor = factor / len(trace)
        self._sums.add(trace / (factor * self.trace_alpha), empty / (factor * (1 - self.trace_alpha)))

    def _estimate_alpha(self) -> None:
        """Update the share from the gradients of the step, summed over the processes."""
        sums, self._sums = self._sums, GradientSums()
        self._metrics["train"]["bvpo/alpha"].append(self.trace_alpha)
        if sums.packed is None:
            return
        if self.accelerator.num_processes > 1:
            sums.packed = self.accelerator.reduce(sums.packed.to(self.accelerator.device), reduction="sum")
        if not bool(sums.packed.isfinite().all()) or sums.packed[0] < 2:
            return  # a step with log-probabilities that are not finite, or a last one of a single prompt
        _, moments = sums.moments()
        # The share is for a whole step, also where this one was the short last one of an epoch.
        self.online_alpha.update(self.args.prompts_per_step, moments)
        for name, value in zip(MOMENTS, self.online_alpha.estimates(), strict=True):
            self._metrics["train"][f"bvpo/{name}"].append(value)

    def _log_halves(self, pairs: PairBatch, values: Tensor) -> None:
        """Log loss and accuracy with traces and without; equal to means over the global batch."""
        agreed = (pairs.margins.detach() > 0).float()
        halves = torch.stack([*values.detach().float().chunk(2), *agreed.chunk(2)]).mean(1)
        halves = self.accelerator.reduce(halves, reduction="mean").tolist()
        names = ("bvpo/trace_loss", "bvpo/empty_loss", "bvpo/trace_accuracy", "bvpo/empty_accuracy")
        mode = "train" if self.model.training else "eval"
        for name, value in zip(names, halves, strict=True):
            self._metrics[mode][name].append(value)
