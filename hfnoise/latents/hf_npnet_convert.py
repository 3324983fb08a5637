"""`hfnoise convert npnet`: an official checkpoint of NPNet as a folder for `NPNet.from_pretrained`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hfnoise.command_options import UsageParser
from hfnoise.errors import UsageError
from hfnoise.folders import new_folder
from hfnoise.latents.hf_convert import DTYPES, cannot_be_converted, checked_output
from hfnoise.latents.hf_npnet_checkpoints import convert_npnet_checkpoint


def main(arguments: Sequence[str]) -> int:
    """Run `hfnoise convert npnet SRC DST`; see
    [`~hfnoise.latents.hf_npnet_checkpoints.convert_npnet_checkpoint`].

    Args:
        arguments (`Sequence[str]`): of the command line.

    Raises:
        UsageError: if it is no checkpoint of NPNet, or nothing can be written; nothing is written then.

    Example:
        >>> from hfnoise.latents.hf_npnet_convert import main
        >>> main(["./no-such-file.pth", "out"])
        Traceback (most recent call last):
        ...
        hfnoise.errors.UsageError: no such folder: './no-such-file.pth'.
    """
    given = _parser().parse_args(arguments)
    out = checked_output(given.src, given.dst)
    options: dict[str, Any] = {} if given.revision is None else {"revision": given.revision}
    if given.no_svd_attention:
        options["svd_attention"] = False
    try:
        with new_folder(out) as folder:
            net = convert_npnet_checkpoint(
                given.src, folder, filename=given.filename, num_tokens=given.num_tokens,
                torch_dtype=getattr(torch, given.dtype), **options,
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UsageError(cannot_be_converted(given.src, error)) from error
    count = sum(parameter.numel() for parameter in net.parameters())
    config = net.config
    print(f"NPNet of {count:,} parameters in {given.dtype}, in {given.dst}")
    print(
        f"It takes latents of {config.in_channels} x {config.sample_size} x {config.sample_size} and "
        f"{config.num_tokens} text states {config.encoder_hid_dim} wide."
    )
    return 0


def _parser() -> UsageParser:
    parser = UsageParser(
        prog="hfnoise convert npnet",
        description="Read an official checkpoint of Golden Noise's NPNet (.pth, of which nothing is executed, or "
        ".safetensors; for SDXL, DreamShaper-XL or Hunyuan-DiT) and write a folder that NPNet.from_pretrained reads "
        "and that can be pushed to the Hub.",
    )
    parser.add_argument("src", metavar="SRC", help="file, or folder or Hub id with one such file")
    parser.add_argument("dst", metavar="DST", help="folder to write; it must not exist, or be empty")
    parser.add_argument("--filename", help="of the checkpoint, in a folder or repository with several")
    parser.add_argument("--num_tokens", type=int, default=77, help="of a prompt; default: 77")
    parser.add_argument(
        "--no_svd_attention",
        action="store_true",
        help="leave out the attention over singular vectors, which the published training code does not train",
    )
    parser.add_argument("--revision", help="branch, tag or commit of SRC on the Hub")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="to write; default: float32")
    return parser
