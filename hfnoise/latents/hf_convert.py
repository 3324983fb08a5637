"""`hfnoise convert oms`: a module of One More Step, in another form; and what all conversions have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hfnoise.command_options import UsageParser
from hfnoise.errors import UsageError
from hfnoise.folders import new_folder, output_folder
from hfnoise.latents.hf_checkpoints import convert_oms_checkpoint, read_json

DTYPES = ("float32", "float16", "bfloat16")
_HALF_VARIANT = "fp16"


def main(arguments: Sequence[str]) -> int:
    """Run `hfnoise convert oms SRC DST`: see [`~hfnoise.latents.hf_checkpoints.convert_oms_checkpoint`].

    Args:
        arguments (`Sequence[str]`): of the command line.

    Raises:
        UsageError: if there is no module, or nothing can be written; nothing is written then.

    Example:
        >>> from hfnoise.latents.hf_convert import main
        >>> main(["./no-such-folder", "out"])
        Traceback (most recent call last):
        ...
        hfnoise.errors.UsageError: no such folder: './no-such-folder'.
    """
    given = _parser().parse_args(arguments)
    out = checked_output(given.src, given.dst)
    # What was saved in half precision is half of it on disk again.
    dtype = given.dtype or ("float16" if given.variant == _HALF_VARIANT else "float32")
    options: dict[str, Any] = {} if given.revision is None else {"revision": given.revision}
    try:
        text = read_json(given.src, "oms_text_encoder/config.json", **options)
        with new_folder(out) as folder:
            module = convert_oms_checkpoint(
                given.src, folder, given.stock, subfolder=given.subfolder, variant=given.variant,
                dtype=getattr(torch, dtype), **options,
            )  # fmt: skip
    except (OSError, ValueError) as error:
        no_weights = isinstance(error, OSError) and not given.variant
        hint = f" (The published modules need --variant {_HALF_VARIANT}.)" if no_weights else ""
        raise UsageError(f"{cannot_be_converted(given.src, error)}{hint}") from error
    count = sum(parameter.numel() for parameter in module.parameters())
    print(f"{type(module).__name__} of {count:,} parameters in {dtype}, in {given.dst}")
    if text is not None and text.get("_name_or_path"):
        place = "/".join(part for part in (text["_name_or_path"], text.get("subfolder")) if part)
        print(f"It reads prompts with the text encoder of {place}: give OneMoreStep(text_encoder=..., tokenizer=...).")
    return 0


def checked_output(src: str, dst: str) -> Path:
    """Return the folder to write.

    Raises:
        UsageError: if it holds something, or there is nothing at `src`, where that is no name on the Hub.

    Example:
        >>> from hfnoise.latents.hf_convert import checked_output
        >>> checked_output("someone/npnet", "out").name
        'out'
    """
    out = output_folder(dst)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{dst!r} is not empty; name a folder that does not exist yet.")
    if not Path(src).exists() and src.startswith((".", "~", "/")):
        raise UsageError(f"no such folder: {src!r}.")
    return out


def cannot_be_converted(src: str, error: Exception) -> str:
    """Return what to say of an error: its first line.

    Example:
        >>> from hfnoise.latents.hf_convert import cannot_be_converted
        >>> cannot_be_converted("there", ValueError("It is empty."))
        "'there' cannot be converted: It is empty."
    """
    message = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{src!r} cannot be converted: {message}"


def _parser() -> UsageParser:
    parser = UsageParser(
        prog="hfnoise convert oms",
        description="Write a module of One More Step (published, SingDiffusion's, ours, or that of a pipeline) as a "
        "TimeFreeUNet2DConditionModel, or as a stock UNet2DConditionModel that computes the same, which diffusers "
        "loads without hfnoise and without trusted remote code.",
    )
    parser.add_argument("src", metavar="SRC", help="folder or Hub id of a module, or of a pipeline with an oms_module")
    parser.add_argument("dst", metavar="DST", help="folder to write; it must not exist, or be empty")
    parser.add_argument("--stock", action="store_true", help="a stock UNet2DConditionModel, with zeros for the time")
    parser.add_argument("--variant", help=f"of the weights in SRC; {_HALF_VARIANT} for the published ones")
    parser.add_argument("--subfolder", help="of SRC; by default the module is found")
    parser.add_argument("--revision", help="branch, tag or commit of SRC on the Hub")
    parser.add_argument(
        "--dtype", choices=DTYPES, help=f"to write; default: float32, or float16 for --variant {_HALF_VARIANT}"
    )
    return parser
