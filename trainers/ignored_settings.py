"""Settings of TRL's pair trainers that nothing reads: refused, where TRL goes on without them."""

from __future__ import annotations

from typing import Any

from trl import DPOConfig


def refuse_ignored_settings(args: Any) -> None:
    """Raise ValueError for settings of a `DPOConfig` that `trl.DPOTrainer` does not read; other arguments pass.

    Args:
        args (`TrainingArguments`): of any Trainer.

    Raises:
        ValueError: what was given, and what to do instead.

    Example:
        >>> from trl import DPOConfig
        >>> from hfnoise.trainers.ignored_settings import refuse_ignored_settings
        >>> refuse_ignored_settings(DPOConfig("out", use_cpu=True, bf16=False))
    """
    if not isinstance(args, DPOConfig):
        return
    if args.padding_free:
        raise ValueError(
            "padding_free=True has no effect: TRL's DPOTrainer pads all the same, which it says in a log. "
            "Leave it out; prefix_sharing=True of NoiseDPOConfig and its subclasses saves the prompt of each pair."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no effect: it smooths the labels of tokens, "
            "and no loss on pairs reads it. The probability that the label of a pair is flipped is flip_rate (TRL: "
            "label_smoothing)."
        )
