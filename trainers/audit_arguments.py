"""Arguments of `hfnoise audit-labels`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hfnoise.option_types import check_least, check_option_types
from hfnoise.preference.pair_loss_table import check_flip_rate


@dataclass
class AuditArguments:
    """What to audit and how; the defaults suit a model of a few hundred million parameters.

    Args:
        model_name_or_path (`str`): Hub id, folder, or `hfnoise:docstrings`.
        dataset_name (`str`): Hub id, local file or folder, or `hfnoise:docstrings`.
        ref_model_name_or_path (`str`, *optional*): if given, the model is taken as already trained by DPO from this
            reference, on other pairs, and nothing is trained here.
        folds (`int`, defaults to `2`): every pair is scored by a model trained on the other folds; at least 2.
        flip_rate (`float`, *optional*): use this rate for `p_flip` instead of the estimate, in [0, 0.5).

    Raises:
        ValueError: for values out of range.
    """

    model_name_or_path: str = field(metadata={"help": "Hub id, folder, or hfnoise:docstrings."})
    dataset_name: str = field(metadata={"help": "Preference dataset: Hub id, file, folder, or hfnoise:docstrings."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to audit."})
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Reference of an already trained model; then nothing is trained, the model is only scored."},
    )
    output_dir: str = field(default="label_audit", metadata={"help": "Folder for report, plot, table and dataset."})
    folds: int = field(default=2, metadata={"help": "Each pair is scored by a model trained on the other folds."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs of the other folds."})
    learning_rate: float = field(default=5e-6, metadata={"help": "Learning rate of the models trained for the audit."})
    beta: float = field(default=0.1, metadata={"help": "Temperature of DPO."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Pairs per device and step."})
    max_length: int = field(default=1024, metadata={"help": "Longest prompt and answer, in tokens."})
    top: int = field(default=20, metadata={"help": "How many suspects the table shows."})
    flip_rate: float | None = field(
        default=None, metadata={"help": "Use this flip rate for p_flip, in [0, 0.5), instead of the estimate."}
    )
    inject_flip_rate: float = field(default=0.0, metadata={"help": "Flip this share first, to try the audit out."})
    seed: int = field(default=0, metadata={"help": "Seed of training, folds and injected flips."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})
    bf16: bool = field(default=False, metadata={"help": "Train and score in bfloat16."})

    def __post_init__(self) -> None:
        check_option_types(self, AuditArguments)
        if self.folds < 2 and self.ref_model_name_or_path is None:
            raise ValueError(f"folds must be at least 2, got {self.folds}: a pair must not judge itself.")
        check_least(self, 1, "top", "per_device_train_batch_size", "max_length")
        check_flip_rate(self.inject_flip_rate, name="inject_flip_rate")
        if self.flip_rate is not None:
            check_flip_rate(self.flip_rate)
