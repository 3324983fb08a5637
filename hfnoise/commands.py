"""The sub-commands that are no methods, and the kinds of checkpoints that `hfnoise convert` knows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A sub-command that is not a method: `launch` is `module:function`, given the list of arguments."""

    name: str
    launch: str
    help: str


COMMANDS: tuple[Command, ...] = (
    Command(
        "generate", "hfnoise.pipelines.generate:main", "images or videos, guided, with a report of what was saved"
    ),
    Command("audit-labels", "hfnoise.trainers.audit_labels:main", "estimate the flip rate of a preference dataset"),
    Command("score-pairs", "hfnoise.trainers.score_pairs:main", "CHES: which pairs DPO would displace likelihood on"),
    Command(
        "make-trace-pairs", "hfnoise.trainers.trace_pairs_run:main", "sample preference pairs with reasoning traces"
    ),
    Command("demo", "hfnoise.worlds.demo:main", "noisy labels on the embedded world: table, plot, saved model"),
    Command(
        "dp-budget", "hfnoise.privacy.budget:main", "noise, epsilon and steps of a private run, before it is started"
    ),
    Command("convert", "hfnoise.convert:main", "a checkpoint of another project -> the form used here, or stock"),
    Command("pack", "hfnoise.quantization.hf_pack:pack_main", "checkpoint folder -> packed at 1 to 8 bits a weight"),
    Command("unpack", "hfnoise.quantization.hf_pack:unpack_main", "packed checkpoint folder -> floats for stock code"),
    Command("bench", "hfnoise.benchmarks.run_all:main", "all benchmarks, small or full, and one report"),
)

# `hfnoise convert KIND SRC DST`.
CONVERSIONS: tuple[Command, ...] = (
    Command(
        "npnet",
        "hfnoise.latents.hf_npnet_convert:main",
        "an official checkpoint of Golden Noise's NPNet -> a folder for NPNet.from_pretrained",
    ),
    Command(
        "oms",
        "hfnoise.latents.hf_convert:main",
        "a module of One More Step -> one without time, or a stock UNet",
    ),
)
