"""Dr. DPO: pairs are weighted by how well they fit the batch, and the batch is the global one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hfnoise.methods import find_method
from hfnoise.option_types import check_option_types
from hfnoise.options import DR_DPO_OPTIONS
from hfnoise.preference.dr_dpo import SMALLEST_DR_BETA, dr_dpo_value
from hfnoise.preference.pair_loss_table import pair_loss_names
from hfnoise.trainers.dr_dpo_global import DeferredNormalization, TwoPassWeights
from hfnoise.trainers.forward_tap import ForwardTap
from hfnoise.trainers.noise_dpo import NoiseDPOTrainer
from hfnoise.trainers.noise_dpo_config import NoiseDPOConfig, option_field
from hfnoise.trainers.pair_batch import PairBatch, pair_batch

__all__ = ["DrDPOConfig", "DrDPOTrainer"]

logger = logging.getLogger(__name__)

PREFIX = "dr_"
# Marks a batch whose reference log-probabilities the first of two passes has computed.
_FRESH = "pair_reference_is_fresh"
# The official run of arXiv 2407.07880 has 8 pairs per process and micro-batch.
_OFFICIAL_MICRO_BATCH = 8
# Their step is made inside the backward pass, before the sum over the global batch is known.
_STEP_IN_BACKWARD = ("lomo", "adalomo")


@dataclass
class DrDPOConfig(NoiseDPOConfig):
    """Configuration for [`DrDPOTrainer`]: [`NoiseDPOConfig`] with the log-mean-exp over the batch.

    Args:
        dr_beta (`float`, defaults to `1.0`): temperature of the weights exp(-loss / dr_beta), at least 0.01145. A
            large one is DPO, a small one trusts only the pairs that the model agrees with already.
        dr_scope (`str`, defaults to `"global"`): `"global"` weighs over processes x accumulation x per-device batch;
            `"micro_batch"` over each per-device batch alone, as the official code does.
        loss_type (`list[str]`, defaults to `["dr_sigmoid"]`): one of `dr_<name>` for a pair loss of
            `hfnoise.preference.pair_loss_names()`; other losses may stand beside it.

    Raises:
        ValueError: for any value out of range, no or two `dr_` losses, or a batch of one pair, where Dr. DPO is DPO.

    Example:
        >>> from hfnoise import DrDPOConfig
        >>> config = DrDPOConfig("out", dr_beta=0.5, use_cpu=True, bf16=False)
        >>> config.loss_type, config.dr_scope
        (['dr_sigmoid'], 'global')
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["dr_sigmoid"],
        metadata={"help": "Losses: one dr_<pair loss>, with others beside it if you like."},
    )
    dr_beta: float = option_field("dr_beta", 1.0, DR_DPO_OPTIONS)
    dr_scope: str = option_field("dr_scope", "global", DR_DPO_OPTIONS)

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        check_option_types(self, DrDPOConfig)
        if not SMALLEST_DR_BETA <= self.dr_beta < float("inf"):
            raise ValueError(
                f"dr_beta must be a finite number of at least {SMALLEST_DR_BETA:.5f}, got {self.dr_beta!r}: below it "
                "a pair whose loss is 1 above the smallest has no weight left in float32, and at 0 none is defined. 1 "
                "is the paper's choice."
            )
        if self.dr_scope not in ("global", "micro_batch"):
            raise ValueError(f"dr_scope must be 'global' or 'micro_batch', got {self.dr_scope!r}.")
        robust = [name for name in self.loss_type if name.startswith(PREFIX)]
        if len(robust) != 1:
            names = ", ".join(PREFIX + name for name in pair_loss_names())
            raise ValueError(f"loss_type must hold exactly one of {names}; got {list(self.loss_type)}.")
        if self.dr_scope == "micro_batch" and self.sample_weight_column is not None:
            raise ValueError(
                f"sample_weight_column={self.sample_weight_column!r} needs dr_scope='global': 'micro_batch' is "
                "the official code, which has no weights."
            )
        super().__post_init__()
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True may end at batches of one pair, where Dr. DPO is plain DPO. Set "
                "per_device_train_batch_size, and gradient_accumulation_steps for the rest of the batch."
            )
        self._refuse_batches_of_one()

    def base_loss(self, name: str) -> str:
        """Return the loss per pair inside the log-mean-exp."""
        return name.removeprefix(PREFIX)

    @property
    def dr_loss(self) -> tuple[str, float]:
        """The loss inside the log-mean-exp and its weight in the sum of losses."""
        place = next(i for i, name in enumerate(self.loss_type) if name.startswith(PREFIX))
        return self.base_loss(self.loss_type[place]), (self.loss_weights or [1.0] * len(self.loss_type))[place]

    def _refuse_batches_of_one(self) -> None:
        pairs = self.train_batch_size
        if self.dr_scope == "global":
            pairs *= self.gradient_accumulation_steps * self.world_size
        if pairs == 1:
            raise ValueError(
                f"Dr. DPO over one pair is plain DPO: dr_scope={self.dr_scope!r} with per_device_train_batch_size="
                f"{self.per_device_train_batch_size}, gradient_accumulation_steps={self.gradient_accumulation_steps} "
                f"and {self.world_size} process(es) weighs single pairs. Raise the batch size"
                + (", or set dr_scope='global'." if self.dr_scope == "micro_batch" else " or the accumulation.")
            )
        if self.dr_scope == "micro_batch" and pairs < _OFFICIAL_MICRO_BATCH:
            logger.warning(
                "Dr. DPO over %d pairs at a time is close to plain DPO (the official runs have 8); "
                "dr_scope='global' weighs over the whole batch at no cost.",
                pairs,
            )


class DrDPOTrainer(NoiseDPOTrainer):
    """Trains with Dr. DPO, -dr_beta log mean exp(-loss / dr_beta), exact over the global batch.

    Dr. DPO (arXiv 2407.07880). Departures from the official code, which takes the mean over the micro-batch of
    each process (with one pair it is DPO) and logs the plain DPO loss: the mean is that of the whole batch, for every
    split of it over processes, accumulation and per-device batch, and the logged loss is the optimised one.
    `eval_loss` is the plain mean of the losses per pair, and `eval_dr_loss` the log-mean-exp over the evaluation set.

    Example:
        >>> from hfnoise import DrDPOTrainer
        >>> DrDPOTrainer._paper["id"]
        '2407.07880'
    """

    _method = find_method("dr-dpo")
    _tag_names = ["trl", *_method.tags]
    _name = "DrDPO"
    _paper = {
        "title": "Towards Robust Alignment of Language Models: Distributionally Robustifying Direct Preference "
        "Optimization",
        "id": _method.paper,
        "citation": _method.bibtex,
    }
    _config_class = DrDPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._base_loss, weight = self.args.dr_loss
        self._pair_losses = [item for item in self._pair_losses if not item[0].startswith(PREFIX)]
        self._dr_weight = weight
        self._eval_losses: list[Tensor] = []
        self.dr_mechanism = self._choose_mechanism()
        mechanisms: dict[str, Any] = {"deferred": DeferredNormalization, "two_pass": TwoPassWeights}
        self._global: DeferredNormalization | TwoPassWeights | None = None
        if self.dr_mechanism in mechanisms:
            self._global = mechanisms[self.dr_mechanism](self, self.args.dr_beta, weight)
        logger.info("Dr. DPO: dr_beta=%g, dr_scope=%s (%s)", self.args.dr_beta, self.args.dr_scope, self.dr_mechanism)

    def _choose_mechanism(self) -> str:
        """Return how the weights are normalised, and refuse what would make them wrong."""
        if self.args.dr_scope == "micro_batch":
            return "micro_batch"
        optimizer = str(getattr(self.args.optim, "value", self.args.optim)).lower()
        steps_in_backward = optimizer in _STEP_IN_BACKWARD or "layerwise" in optimizer
        if len(self.args.loss_type) == 1 and not self.aux_loss_enabled and not steps_in_backward:
            return "deferred"
        dropout = [name for name, module in self.model.named_modules() if isinstance(module, nn.Dropout) and module.p]
        if getattr(self.model.config.get_text_config(), "attention_dropout", 0):  # a function, not a module
            dropout.append("attention_dropout of the model's configuration")
        if dropout:
            raise ValueError(
                f"dropout ({dropout[0]} and {len(dropout) - 1} more) would give a pair another loss in each of the "
                "two passes that this combination of losses, model and optimizer needs. Set it to 0 (disable_dropout="
                "True, lora_dropout=0), or train with one dr_ loss alone."
            )
        return "two_pass"

    def run_identity(self) -> dict[str, Any]:
        """Return what must agree between a checkpoint and the run that resumes from it."""
        return {**super().run_identity(), "dr_beta": self.args.dr_beta, "dr_scope": self.args.dr_scope}

    def report(self) -> dict[str, Any]:
        """Return what is known of the noise and of the weights, for the card."""
        settings = {"dr_beta": self.args.dr_beta, "dr_scope": self.args.dr_scope, "dr_mechanism": self.dr_mechanism}
        return {**super().report(), "settings": settings}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of a step, as `Trainer` does; the weights over them begin anew."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._global is not None and batches:
            # A stream may end an epoch in the middle of a step, which the Trainer does not finish: what it left must
            # not be scaled with the gradients of this one.
            self.model.zero_grad(set_to_none=True)
            self._monitor.skip_step = False
            self._global.start_step(batches, device)
        return batches, items

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch; with the last of a step the gradients become those of the global batch."""
        synchronised = self.accelerator.sync_gradients
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._global is None or not synchronised:
            # Deferred: the value is known, and logged, with the last micro-batch.
            return torch.zeros_like(loss) if self.dr_mechanism == "deferred" else loss
        if not any(parameter.grad is not None for parameter in self.model.parameters()):
            return loss  # the step is left out on every process
        value, effective = self._global.finish_step()
        self._metrics["train"]["noise/effective_fraction"].append(effective)
        return loss.new_tensor(value) if self.dr_mechanism == "deferred" else loss

    def reduced_pair_losses(self, pairs: PairBatch, tap: ForwardTap) -> Tensor:
        """Return what a micro-batch adds to the loss: weighted pairs in training, the plain mean in evaluation."""
        losses, weights = self._dr_losses(pairs), pairs.weight
        others = super().reduced_pair_losses(pairs, tap) if self._pair_losses else torch.zeros_like(losses[0])
        if not self.model.training:
            counted = torch.ones_like(losses) if weights is None else weights
            gathered = self.accelerator.gather_for_metrics((losses.detach(), counted))
            self._eval_losses.append(torch.stack(gathered).cpu())
            mean = (losses if weights is None else weights * losses).mean()
            return self._dr_weight * mean + others
        if self._global is not None:
            return self._global.loss(losses, weights) + others
        return self._dr_weight * dr_dpo_value(losses, self.args.dr_beta) + others

    def _dr_losses(self, pairs: PairBatch) -> Tensor:
        unweighted = replace(pairs, weight=None)
        return self.weighted_pair_values([(self._base_loss, 1.0)], unweighted, pairs.margins)

    @torch.no_grad()
    def losses_without_graph(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the loss and the weight of every pair of a micro-batch; the batch keeps its reference log-probs."""
        self.model.train()
        inputs, columns = self.split_columns(self._prepare_inputs(batch))
        inputs = self._with_reference(inputs)
        batch |= {key: inputs[key] for key in ("ref_chosen_logps", "ref_rejected_logps")}
        batch[_FRESH] = True
        pairs = pair_batch(self._policy_log_probs(inputs), inputs, self.beta, columns)
        return self._dr_losses(pairs), pairs.weight

    def _with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs with the reference log-probabilities; those of the first of two passes are used again."""
        return inputs if inputs.pop(_FRESH, False) else super()._with_reference(inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, and add the log-mean-exp over the whole set, which is no mean over its batches."""
        self._eval_losses = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._eval_losses:
            losses, weights = torch.cat(self._eval_losses, dim=1)
            dr_beta = self.args.dr_beta
            value = dr_dpo_value(losses - dr_beta * weights.log(), dr_beta) + dr_beta * weights.mean().log()
            output.metrics[f"{prefix}_dr_loss"] = value.item()
        self._eval_losses = []
        return output
