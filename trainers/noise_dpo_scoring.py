"""The scoring side of NoiseDPOTrainer: the margin, reference and CHES of every pair of a dataset."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hfnoise.trainers.ches_capture import (
    CHES_COLUMNS,
    REFERENCE_COLUMNS,
    ches_of_batch,
    final_hidden_states,
    refuse_prefix_sharing,
)
from hfnoise.trainers.pair_batch import pair_batch
from hfnoise.trainers.preference_data import PAIR_INDEX
from hfnoise.trainers.reference_cache import with_columns


class NoiseDPOScoringMixin:
    """What `trl.DPOTrainer` lacks: margins by row instead of their mean."""

    args: Any
    model: Any
    accelerator: Any

    def prepared(self, dataset: Any) -> Any:
        """Return the dataset tokenized, unless it is or has images; `drop_invalid_pairs` applies to it as well."""
        if self._is_vision_dataset or "chosen_ids" in next(iter(dataset)):  # type: ignore[attr-defined]
            return dataset
        return self._prepare_dataset(dataset, self.processing_class, self.args, "scored")  # type: ignore[attr-defined]

    @torch.no_grad()
    def pair_margins(self, dataset: Any) -> Tensor:
        """Return the margin of every pair of a dataset under the present policy, in the order of its rows.

        Args:
            dataset (`datasets.Dataset`): with the columns of a training dataset; tokenized here unless it is already.

        Returns:
            `torch.Tensor` of shape `(len(dataset),)`, float32, on the CPU, the same on every process: positive where
            the policy agrees with the label. Pairs that `drop_invalid_pairs` drops are not among them.
        """
        dataset = self.prepared(dataset)
        in_rows = isinstance(dataset, Dataset)
        hide = self.args.disable_tqdm or not self.is_local_process_zero()  # type: ignore[attr-defined]
        margins = []
        training = self.model.training
        self.model.eval()
        try:
            for batch in tqdm(self._row_loader(dataset), desc="Scoring preference pairs", disable=hide):
                inputs, columns = self.split_columns(self._prepare_inputs(batch))  # type: ignore[attr-defined]
                inputs = self._with_reference(inputs)  # type: ignore[attr-defined]
                pairs = pair_batch(self._policy_log_probs(inputs), inputs, self.beta, columns)  # type: ignore[attr-defined]
                values = self.by_row(pairs.margins)
                values = self.accelerator.gather_for_metrics(values) if in_rows else values
                margins.append(values.float().cpu())
        finally:
            self.model.train(training)
        return torch.cat(margins)

    def score_dataset(self, dataset: Dataset) -> Dataset:
        """Return the dataset with what the reference says of every pair, from one forward pass over it.

        Columns: `ref_chosen_logps` and `ref_rejected_logps`, the log-probabilities of the answers, and `ches` and
        `ln_ches`, how much DPO from this reference will lower the likelihood of the chosen answer (see
        `hfnoise.preference.ches_scores`); `hfnoise.filter_by_ches` selects by them.

        Args:
            dataset (`datasets.Dataset`): with the columns of a training dataset; tokenized here unless it is already.

        Returns:
            `datasets.Dataset`: your rows in their order, less those that `drop_invalid_pairs` drops, with the four
            columns, float; the same on every process. Columns of these names are replaced.

        Raises:
            ValueError: for a streaming dataset, with `prefix_sharing`, or once the reference is gone (after training
                with `precompute_ref_log_probs=True` and without `ref_model` or PEFT).
        """
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"score_dataset adds columns to a map-style datasets.Dataset, got {type(dataset).__name__}. Load the "
                "pairs without streaming=True, and pass one split."
            )
        refuse_prefix_sharing(self.args)
        prepared = self.prepared(dataset)
        columns = self.reference_columns(prepared, self.args.eval_batch_size, with_ches=True)
        return with_columns(self.given_rows(dataset, prepared), columns)

    def given_rows(self, given: Dataset, prepared: Dataset) -> Dataset:
        """Return the rows of the user's dataset that are in the prepared one.

        The prepared one is not the user's: TRL glues the end-of-sequence token to the answers of what it tokenizes.
        """
        if self._is_vision_dataset or "chosen_ids" in given.column_names:  # type: ignore[attr-defined]
            return prepared
        return given.select(prepared[PAIR_INDEX])

    def with_reference_columns(self, dataset: Dataset, batch_size: int) -> Dataset:
        """Return a prepared dataset with the columns that `precompute_ref_log_probs` adds, computed now."""
        return with_columns(dataset, self.reference_columns(dataset, batch_size, self.args.compute_ches))

    @torch.no_grad()
    def reference_columns(self, dataset: Dataset, batch_size: int, with_ches: bool) -> dict[str, Tensor]:
        """Return what one pass of the reference over a prepared dataset gives, computed by all processes together.

        Args:
            dataset (`datasets.Dataset`): prepared.
            batch_size (`int`): pairs per forward pass and process.
            with_ches (`bool`): catch the hidden states as well, at no further forward pass.

        Returns:
            `dict[str, torch.Tensor]`: `ref_chosen_logps`, `ref_rejected_logps` and, if asked for, `ches` and
            `ln_ches`, each of shape `(len(dataset),)`, float32, on the CPU, the same on every process.
        """
        model = self.reference_model()  # type: ignore[attr-defined]
        names = REFERENCE_COLUMNS + (CHES_COLUMNS if with_ches else ())
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        hide = self.args.disable_tqdm or not self.is_local_process_zero()  # type: ignore[attr-defined]
        loader = self._row_loader(dataset, batch_size)
        training = model.training
        model.eval()
        try:
            for batch in tqdm(loader, desc="Computing reference log probs", disable=hide):
                scores = self._reference_scores(model, self._prepare_inputs(batch), with_ches)  # type: ignore[attr-defined]
                by_row = tuple(self.by_row(values) for values in scores)
                for name, values in zip(names, self.accelerator.gather_for_metrics(by_row), strict=True):
                    parts[name].append(values.float().cpu())
        finally:
            model.train(training)
        return {name: torch.cat(values) for name, values in parts.items()}

    def _reference_scores(self, model: Any, inputs: dict[str, Any], with_ches: bool) -> tuple[Tensor, ...]:
        if not with_ches:
            return tuple(self.compute_ref_log_probs(model, inputs))  # type: ignore[attr-defined]
        with final_hidden_states(self.accelerator.unwrap_model(model)) as caught:
            log_probs = self.compute_ref_log_probs(model, inputs)  # type: ignore[attr-defined]
        ches = ches_of_batch(caught, inputs["completion_mask"])
        return (*log_probs, *(score.to(log_probs[0].device) for score in ches))

    @staticmethod
    def by_row(values: Tensor) -> Tensor:
        """Return values per pair by row of the dataset; here every row is one pair."""
        return values

    def _row_loader(self, dataset: Any, batch_size: int | None = None) -> DataLoader[Any]:
        """Return a loader of all rows of a prepared dataset in their order, shared by the processes.

        The Trainer's evaluation loader is none: it may sort rows by length, drop the last batch, and with persistent
        workers it returns the dataset of an earlier evaluation.
        """
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, "Scoring")  # type: ignore[attr-defined]
            collator = self.data_collator  # type: ignore[attr-defined]
        else:
            collator = self._get_collator_with_removed_columns(self.data_collator, "Scoring")  # type: ignore[attr-defined]
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size or self.args.eval_batch_size,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        # accelerate fills the last batch of a stream with rows that it cannot take away: every process reads it all.
        return self.accelerator.prepare(loader) if isinstance(dataset, Dataset) else loader

    def _policy_log_probs(self, inputs: dict[str, Any]) -> Tensor:
        kept_back = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
        arguments = {key: value for key, value in inputs.items() if key not in kept_back}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            model = self.sharing_prefixes(self.model)  # type: ignore[attr-defined]
            return model(**arguments, use_cache=False, labels=labels, fused_lm_head=True).log_probs
