"""The data side of BVPOTrainer: four branches per row, tokenized, checked and scored together."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, IterableDataset, is_caching_enabled
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hfnoise.trainers.ches_capture import CHES_COLUMNS, REFERENCE_COLUMNS
from hfnoise.trainers.noise_dpo_data import PAIR_COLUMNS, reference_key
from hfnoise.trainers.pair_collator import PairColumnCollator
from hfnoise.trainers.preference_data import PAIR_INDEX, add_pair_index, removed_message, report_removed
from hfnoise.trainers.reference_cache import with_cached_columns, with_columns, without_columns
from hfnoise.trainers.trace_collator import DataCollatorForTracePreference
from hfnoise.trainers.trace_tokens import BRANCHES, TraceFaultError, answer_text, trace_and_answer, trace_pair_ids

_NOTHINK_COLUMNS = tuple(f"nothink_{name}" for name in PAIR_COLUMNS)
# The share of rows that may be too long before the dataset is refused: more would be another dataset.
LARGEST_CUT_SHARE = 0.2


class TraceDataMixin:
    """Overrides of `NoiseDPOTrainer` that concern rows of four branches."""

    args: Any
    data_collator: Any

    def check_datasets(self, args: Any, train_dataset: Any, eval_dataset: Any) -> None:
        """Raise ValueError for datasets that are no trace preferences, before a model is loaded."""
        super().check_datasets(args, train_dataset, eval_dataset)  # type: ignore[misc]
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        named = {f"eval_dataset {key}".strip(): dataset for key, dataset in evaluated.items()}
        named["train_dataset"] = train_dataset
        for name, dataset in named.items():
            refuse_other_rows(dataset, name)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `DPOTrainer` does; a new dataset is checked first."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            for dataset in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
                refuse_other_rows(dataset, "eval_dataset")
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]
        return metrics

    def wrap_collator(self) -> None:
        """Let batches hold four branches per row, and the per-row columns."""
        self._use_trace_collator()
        super().wrap_collator()  # type: ignore[misc]

    def _use_trace_collator(self) -> None:
        """Put our collator in the place of the one `DPOTrainer` makes; refuse one that would drop branches."""
        stock = self.data_collator
        if isinstance(stock, (DataCollatorForTracePreference, PairColumnCollator)):  # ours, or ours wrapped
            return
        if type(stock) is not DataCollatorForPreference:
            raise ValueError(
                f"data_collator is a {type(stock).__name__}; BVPO needs a DataCollatorForTracePreference, or none."
            )
        self.data_collator = DataCollatorForTracePreference(
            pad_token_id=stock.pad_token_id, max_length=stock.max_length, pad_to_multiple_of=stock.pad_to_multiple_of
        )

    def split_columns(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the inputs of the stock loss, and the per-row columns once for each of the two pairs of a row."""
        inputs, columns = super().split_columns(inputs)  # type: ignore[misc]
        return inputs, {name: torch.cat([values, values]) for name, values in columns.items()}

    @staticmethod
    def by_row(values: Tensor) -> Tensor:
        """Return values per pair, shape `(2 B,)`, by row of the dataset, shape `(B, 2)`: with traces, without."""
        return values.view(2, -1).T.contiguous()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        new = [column for column in _NOTHINK_COLUMNS if column not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *new]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Return the dataset with two reference log-probabilities for chosen and for rejected in every row."""
        self._use_trace_collator()  # DPOTrainer precomputes while it is being built
        with_ches = self.args.compute_ches
        dataset = without_columns(dataset, REFERENCE_COLUMNS + (CHES_COLUMNS if with_ches else ()))

        def compute() -> dict[str, Tensor]:
            return self.reference_columns(dataset, batch_size, with_ches)  # type: ignore[attr-defined]

        if not dataset.cache_files or not is_caching_enabled():
            return with_columns(dataset, compute())
        key = reference_key(dataset, self.args, (*PAIR_COLUMNS, *_NOTHINK_COLUMNS))
        return with_cached_columns(dataset, (key, self._precompute_model_hash), self.accelerator, compute)  # type: ignore[attr-defined]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Return the dataset tokenized, without rows that cannot be trained on.

        Raises:
            ValueError: for faulty rows unless `drop_invalid_pairs` is set, and if more than 20 % would be cut.
        """
        name = f"the {dataset_name} dataset"
        if not args.precompute_ref_log_probs:
            dataset = without_columns(dataset, REFERENCE_COLUMNS)  # of another trainer
        if {*PAIR_COLUMNS, *_NOTHINK_COLUMNS} <= set(dataset.column_names):
            indexed = dataset if PAIR_INDEX in dataset.column_names else add_pair_index(dataset)
            return self._without_cut_rows(indexed, args.max_length, name, args.drop_invalid_pairs)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos_token, so no answer would end; set tokenizer.eos_token.")
        indexed = add_pair_index(dataset)
        with args.main_process_first(desc="tokenizing trace pairs"):
            tokenized = indexed.map(
                _tokenize,
                fn_kwargs={"tokenizer": tokenizer},
                num_proc=args.dataset_num_proc,
                desc=f"Tokenizing {dataset_name} dataset",
            )
        for fault in sorted(set(tokenized["fault"]) - {""}):
            rows = [row for row, found in enumerate(tokenized["fault"]) if found == fault]
            if not args.drop_invalid_pairs or len(rows) == len(tokenized):
                raise ValueError(
                    f"{removed_message(rows, len(dataset), name, fault)}. Mend them or set drop_invalid_pairs=True to "
                    "train without them."
                )
        if not any(tokenized["has_trace"]):
            raise ValueError(
                f"no row of {name} has a trace in chosen: a chat template may have deleted them (DeepSeek-R1's does). "
                "Give completions with their <think>...</think>, as hfnoise.make_trace_pairs writes them."
            )
        valid = tokenized.filter(_is_faultless, input_columns="fault").remove_columns(["fault", "has_trace"])
        if args.drop_invalid_pairs:
            report_removed(tokenized, valid, name, "have no usable trace or answer", "Mend them", drop=True)
        return self._without_cut_rows(valid, args.max_length, name, args.drop_invalid_pairs)

    @staticmethod
    def _without_cut_rows(dataset: Dataset, max_length: int | None, name: str, drop: bool) -> Dataset:
        """Return the dataset without the rows of which a branch is longer than `max_length`: dropped and counted."""
        if max_length is None:
            return dataset
        kept = dataset.filter(_fits, fn_kwargs={"max_length": max_length})
        share = 1 - len(kept) / len(dataset)
        report_removed(
            dataset, kept, name, f"have an answer that max_length={max_length} would cut", "Raise max_length",
            drop=drop or share <= LARGEST_CUT_SHARE,
        )  # fmt: skip
        return kept


def refuse_other_rows(dataset: Any, name: str) -> None:
    """Raise ValueError unless the rows of a dataset have four branches and can be counted."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is a streaming dataset; BVPO counts the rows whose answer would be cut before it trains, "
            "so it needs a map-style one. Load it without streaming=True."
        )
    if isinstance(dataset, Dataset) and not {*PAIR_COLUMNS, *_NOTHINK_COLUMNS} <= set(dataset.column_names):
        missing = [column for column in ("prompt", *BRANCHES) if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"{name} lacks the columns {missing}; it has {dataset.column_names}. BVPO needs prompt, "
                "chosen and rejected with traces, chosen_nothink and rejected_nothink without; "
                "hfnoise.make_trace_pairs samples them."
            )


def _tokenize(example: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    try:
        has_trace = bool(trace_and_answer(answer_text(example["chosen"]))[0])
        return {**trace_pair_ids(example, tokenizer), "fault": "", "has_trace": has_trace}
    except TraceFaultError as fault:
        empty: list[int] = []
        return {**dict.fromkeys((*PAIR_COLUMNS, *_NOTHINK_COLUMNS), empty), "fault": str(fault), "has_trace": False}


def _is_faultless(fault: str) -> bool:
    return fault == ""


def _fits(example: dict[str, Any], max_length: int) -> bool:
    lengths = [
        len(example[f"{kind}prompt_ids"]) + len(example[f"{kind}{side}_ids"])
        for kind in ("", "nothink_")
        for side in ("chosen", "rejected")
    ]
    return max(lengths) <= max_length
