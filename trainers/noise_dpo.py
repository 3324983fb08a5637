"""DPO with noise-robust pair losses, per-pair flip rates and weights: `trl.DPOTrainer` with its loss tapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor
from trl import DPOTrainer

from hfnoise.methods import find_method
from hfnoise.preference.pair_loss_table import find_pair_loss
from hfnoise.trainers.checkpoints import NoiseRunState
from hfnoise.trainers.forward_tap import ForwardTap
from hfnoise.trainers.noise_dpo_config import NoiseDPOConfig
from hfnoise.trainers.noise_dpo_data import NoiseDPODataMixin
from hfnoise.trainers.noise_dpo_run import NoiseDPORunMixin
from hfnoise.trainers.noise_dpo_scoring import NoiseDPOScoringMixin
from hfnoise.trainers.pair_batch import PairBatch, pair_batch
from hfnoise.trainers.pair_monitor import PairMonitor
from hfnoise.trainers.prefix_sharing import PrefixSharingMixin
from hfnoise.trainers.quantized_base import keep_differentiable

__all__ = ["NoiseDPOConfig", "NoiseDPOTrainer"]


class NoiseDPOTrainer(NoiseDPODataMixin, NoiseDPOScoringMixin, NoiseDPORunMixin, PrefixSharingMixin, DPOTrainer):
    """Trains with DPO on noisy preference labels; takes the arguments of [`~trl.DPOTrainer`] and a [`NoiseDPOConfig`].

    The losses are functions of the margin that TRL's own forward pass gives (see `ForwardTap`), so TRL's metrics, its
    losses, PEFT, quantised bases, precomputed references and MoE auxiliary losses stay as they are. With neutral
    settings (`loss_type="sigmoid"`, no columns) losses, gradients and weights equal those of `DPOTrainer` to the bit.

    Raises:
        ValueError: at construction, for data, settings or a distributed engine that would give a wrong result.

    Example:
        >>> from hfnoise import NoiseDPOConfig, NoiseDPOTrainer
        >>> issubclass(NoiseDPOTrainer, __import__("trl").DPOTrainer)
        True
    """

    _method = find_method("noise-dpo")
    _tag_names = ["trl", *_method.tags]
    _name = "NoiseDPO"
    _paper = {
        "title": "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        "id": _method.paper,
        "citation": _method.bibtex,
    }
    _config_class = NoiseDPOConfig
    _purpose = "for preference labels of which a share is flipped"  # ends the first sentence of the card

    def __init__(self, model: Any, ref_model: Any = None, args: NoiseDPOConfig | None = None, **kwargs: Any) -> None:
        args = self.default_config(model) if args is None else args
        self.refuse_before_loading(args, kwargs)
        super().__init__(model, ref_model, args, **self.number_vision_pairs(args, kwargs))
        self.refuse_engines()
        keep_differentiable(self.model)
        self.sharing_prefixes(self.model)  # refuses here what it cannot share
        self.add_callback(NoiseRunState(self.run_identity()))
        names_and_weights = list(zip(args.loss_type, self.loss_weights, strict=True))
        self._pair_losses = [(name, weight) for name, weight in names_and_weights if not args.is_computed_by_trl(name)]
        native = [(name, weight) for name, weight in names_and_weights if args.is_computed_by_trl(name)]
        self._has_own_loss, self._has_native_loss = bool(self._pair_losses), bool(native)
        # TRL needs a loss of its own: it computes `sigmoid`, which is then thrown away; a weight of 0 would
        # make NaN of an infinite loss.
        self.loss_types, self.loss_weights = map(list, zip(*(native or [("sigmoid", 1.0)]), strict=True))
        self._pair_context = args.pair_context()
        self._monitor = PairMonitor(self, args)
        self.wrap_collator()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a micro-batch: TRL's losses and ours, on one forward pass."""
        inputs, columns = self.split_columns(inputs)
        inputs = self._with_reference(inputs)
        tap = ForwardTap(self.sharing_prefixes(model))
        with self._reference_in_inputs(), self._monitor.watch():
            result = super().compute_loss(tap, inputs, return_outputs, num_items_in_batch)
            loss, outputs = result if return_outputs else (result, None)
            pairs = pair_batch(tap.output.log_probs, inputs, self.beta, columns)
            if self._has_own_loss:
                loss = self._with_pair_losses(loss, pairs, tap)
            self._monitor.observe(pairs, inputs)
        return (loss, outputs) if return_outputs else loss

    def _with_pair_losses(self, native_loss: Tensor, pairs: PairBatch, tap: ForwardTap) -> Tensor:
        """Return the sum of the losses TRL computed, if any was asked for, and ours."""
        total = self.reduced_pair_losses(pairs, tap)
        if self._has_native_loss:
            return native_loss + total
        if self.aux_loss_enabled:  # it was thrown away with TRL's own loss
            total = total + self.router_aux_loss_coef * tap.output.aux_loss
        return total

    def reduced_pair_losses(self, pairs: PairBatch, tap: ForwardTap) -> Tensor:
        """Return the sum of our losses over a micro-batch as one number, with its graph: their mean."""
        return self.weighted_pair_values(self._pair_losses, pairs, pairs.margins).mean()

    def weighted_pair_values(self, losses: list[tuple[str, float]], pairs: PairBatch, margins: Tensor) -> Tensor:
        """Return the weighted sum of the named losses per pair, shape `(batch,)`, at the given margins."""
        context = replace(
            self._pair_context,
            flip_rate=self._pair_context.flip_rate if pairs.flip_rate is None else pairs.flip_rate,
            chosen_scores=pairs.chosen_scores,
            rejected_scores=pairs.rejected_scores,
            chosen_lengths=pairs.chosen_lengths,
            rejected_lengths=pairs.rejected_lengths,
            mode="train" if self.model.training else "eval",
        )
        values: Any = sum(find_pair_loss(name).function(margins, context) * weight for name, weight in losses)
        return values if pairs.weight is None else pairs.weight * values

    def _with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs with the reference log-probabilities, computed unless the dataset brought them."""
        # Columns that nobody asked for may be those of another model: recomputed, as in TRL.
        if "ref_chosen_logps" in inputs and self.args.precompute_ref_log_probs:
            return inputs
        chosen, rejected = self.compute_ref_log_probs(self.reference_model(), inputs)
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def reference_model(self) -> Any:
        """Return the model whose log-probabilities are the reference; `compute_ref_log_probs` sees to adapters.

        Raises:
            ValueError: if it is not in memory any more.
        """
        if self.args.precompute_ref_log_probs and self.ref_model is None and not is_peft_model(self.model):
            self._refuse_trained_reference()
        # Not `or`: a compiled module is asked for its length then, and has none.
        return self.model if self.ref_model is None else self.ref_model

    def _refuse_trained_reference(self) -> None:
        """Raise ValueError once the policy has been trained: the reference it was then is not in memory."""
        if self.state.global_step > 0:
            raise ValueError(
                "the reference log-probabilities of these pairs were not precomputed, and the reference model is gone "
                "(precompute_ref_log_probs=True without ref_model). Pass the pairs as eval_dataset at construction, "
                "pass a ref_model, or set precompute_ref_log_probs=False."
            )

    @contextmanager
    def _reference_in_inputs(self) -> Iterator[None]:
        """Let TRL read the reference log-probabilities from the inputs for one call."""
        before = self.precompute_ref_logps
        self.precompute_ref_logps = True
        try:
            yield
        finally:
            self.precompute_ref_logps = before
