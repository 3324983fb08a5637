"""The command line: `hfnoise list`, `hfnoise <method> --config run.yaml`, `hfnoise demo`; also `python -m hfnoise`."""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import hfnoise
from hfnoise.commands import COMMANDS
from hfnoise.errors import PushError, UsageError
from hfnoise.golden_noise_options import NOISE_NET_OPTIONS, NOISE_PAIR_OPTIONS
from hfnoise.guidance_options import GENERATE_OPTIONS
from hfnoise.latents_options import IMAGE_DATA_OPTIONS, MODULE_OPTIONS, START_OPTIONS
from hfnoise.methods import METHODS, Method
from hfnoise.options import DP_OPTIONS, FEDSVD_DATA_OPTIONS, QAT_DATA_OPTIONS, Option

_INDENTED: Any = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
# Options that the command line adds to those of the configuration classes, by method and heading.
_MORE_OPTIONS: dict[str, dict[str, tuple[Option, ...]]] = {
    "fedsvd": {"Data": FEDSVD_DATA_OPTIONS},
    "qat": {"Data": QAT_DATA_OPTIONS},
    "one-more-step": {"Pipeline and images": IMAGE_DATA_OPTIONS, "Module": MODULE_OPTIONS},
    "golden-noise": {"Pairs and evaluation": NOISE_PAIR_OPTIONS, "Network": NOISE_NET_OPTIONS},
}
_USAGE = "usage: hfnoise <command> [options]     (hfnoise <command> --help says more)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 saved but not pushed, 2 usage error (no traceback).

    Args:
        arguments (`Sequence[str]`, *optional*): those of the process by default.

    Example:
        >>> from hfnoise.__main__ import main
        >>> main(["--version"])
        hfnoise 0.1.0
        0
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (given[0], given[1:]) if given else ("--help", [])
    try:
        return _dispatch(command, rest)
    except UsageError as error:
        print(f"hfnoise {command}: error: {error}", file=sys.stderr)
        return 2
    except PushError as error:  # all is saved, and the message says where
        print(f"hfnoise {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        trains = any(method.name == command and not method.guider for method in METHODS)
        hint = "; --resume_from_checkpoint true goes on from the last checkpoint, if there is one" if trains else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130


def _dispatch(command: str, rest: list[str]) -> int:
    if command in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if command == "--version":
        print(f"hfnoise {hfnoise.__version__}")
        return 0
    if command == "list":
        print(_table())
        return 0
    for method in METHODS:
        if method.name == command:
            if "-h" in rest or "--help" in rest:
                print(_method_help(method))
                return 0
            return _call(method.launch, [method.name, *rest])
    for other in COMMANDS:
        if other.name == command:
            return _call(other.launch, rest)
    known = ["list", *(method.name for method in METHODS), *(other.name for other in COMMANDS)]
    meant = "".join(f" Did you mean {name}?" for name in get_close_matches(command, known, n=1))
    raise UsageError(f"unknown command.{meant} Known are {', '.join(known)}.")


def _call(launch: str, arguments: list[str]) -> int:
    # The library says what it chose for the user in log messages; a command line shows them.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_missing_kernel)
    # TRL calls this option of transformers by its old name: nothing a user of the command line can mend.
    old_name = "`(is_)?gradient_checkpointing(_enable|_disable|_kwargs)?` is deprecated"
    warnings.filterwarnings("ignore", message=old_name, category=FutureWarning)
    main_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("hfnoise").setLevel(logging.INFO if main_process else logging.ERROR)
    # Read when torch is imported, below. On busy cores threads that wait by spinning keep the others from working.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    module, _, function = launch.partition(":")
    return int(getattr(import_module(module), function)(arguments) or 0)


def _is_no_missing_kernel(record: logging.LogRecord) -> bool:
    """Return False for what bitsandbytes says of a faster 4-bit kernel whenever it is imported, 4 bits or not."""
    return "gemm_4bit_forward" not in record.getMessage()


def _overview() -> str:
    commands = [("list", "every method, its paper and what it replaces")]
    commands += [(method.name, method.title) for method in METHODS]
    commands += [(other.name, other.help) for other in COMMANDS]
    width = max(len(name) for name, _ in commands)
    return "\n".join([_USAGE, "", *(f"  {name:<{width}}  {text}" for name, text in commands)])


def _table() -> str:
    header = ("method", "family", "paper", "class", "instead of")
    rows = [(one.name, one.family, f"arXiv {one.paper}", one.main_class, one.stock) for one in METHODS]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def _method_help(method: Method) -> str:
    if method.guider:
        return _guider_help(method)
    names = ", ".join(dict.fromkeys([method.config, method.trainer, *method.exports]))
    lines = [
        f"usage: hfnoise {method.name} [--config run.yaml] [--accelerate_config NAME_OR_FILE] [--option value ...]",
        "",
        f"{method.title} (arXiv {method.paper}). In Python: from hfnoise import {names}",
        "",
        "Options of hfnoise:",
    ]
    lines += _option_lines(method.options)
    for heading, options in _MORE_OPTIONS.get(method.name, {}).items():
        lines += ["", f"{heading}:", *_option_lines(options)]
    if method.name == "fedsvd":
        shown = [option for option in DP_OPTIONS if option.name in ("target_epsilon", "noise_multiplier", "clip_norm")]
        lines += ["", "Privacy of each client, none without one of the first two (more: `hfnoise dp-sft --help`):"]
        lines += _option_lines(shown)
    lines += [
        "",
        "Launching:",
        "  --config FILE             YAML file of options; the command line wins over it",
        "  --accelerate_config NAME  run under `accelerate launch`: multi_gpu, single_gpu or a YAML file of yours",
    ]
    if method.family == "preference":
        lines.append("  --inject_flip_rate RATE   flip this share of the labels first, to try a method out")
    if method.family == "latents":
        more = "Every option of transformers.TrainingArguments works as well (--max_steps, --push_to_hub, ...);"
    else:
        stock = method.stock.split()[0].strip(",;")
        more = (
            f"Every option of {stock} works as well, and --model_name_or_path, --dataset_name,\n"
            "--use_peft, --load_in_4bit, ...;"
        )
    lines += ["", f"{more} `hfnoise {method.name} --help-all` lists them all (slow: it imports TRL)."]
    return "\n".join(lines)


def _guider_help(method: Method) -> str:
    lines = [
        f"usage: hfnoise {method.name} --model_name_or_path NAME --prompt TEXT [--config run.yaml] [--option value]",
        "",
        f"{method.title} (arXiv {method.paper}). In Python: from hfnoise import guide, {', '.join(method.exports)}",
        "",
        "Options of the guider:",
        *_option_lines(method.options),
        "",
        "What is drawn:",
        *_option_lines([option for option in GENERATE_OPTIONS if option.name != "guider"]),
        "",
        "Where sampling starts:",
        *_option_lines(START_OPTIONS),
        "",
        "  --config FILE             YAML file of options; the command line wins over it",
        "",
        f"`hfnoise generate --guider {method.name.removesuffix('-guidance')}` is the same; several guiders are joined "
        "by +.",
    ]
    return "\n".join(lines)


def _option_lines(options: Sequence[Option]) -> list[str]:
    lines = []
    for option in options:
        default = "" if option.default is None else f", default {option.default}"
        lines += [f"  --{option.name} ({option.type}{default})", *textwrap.wrap(option.help, 100, **_INDENTED)]
    return lines


if __name__ == "__main__":
    sys.exit(main())
