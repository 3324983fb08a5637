"""Arguments of the training commands that belong to no configuration class of a Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import ScriptArguments

from hfnoise.option_types import check_option_types
from hfnoise.preference.pair_loss_table import check_flip_rate


@dataclass
class PreferenceScriptArguments(ScriptArguments):
    """[`~trl.ScriptArguments`] with label noise that can be injected to try a method out.

    Args:
        inject_flip_rate (`float`, defaults to `0.0`): share of the labels to flip, in [0, 0.5), in the training and
            the evaluation split alike.
        flip_seed (`int`, defaults to `0`): another seed flips other pairs.

    Raises:
        ValueError: if the share is out of range.

    Example:
        >>> from hfnoise.trainers.launch_arguments import PreferenceScriptArguments
        >>> PreferenceScriptArguments(dataset_name="hfnoise:docstrings").inject_flip_rate
        0.0
    """

    inject_flip_rate: float = field(
        default=0.0,
        metadata={"help": "Share of the labels to flip in both splits, in [0, 0.5), to try a method out."},
    )
    flip_seed: int = field(default=0, metadata={"help": "Seed of the injected flips."})

    def __post_init__(self) -> None:
        check_option_types(self, PreferenceScriptArguments)
        check_flip_rate(self.inject_flip_rate, name="inject_flip_rate")
