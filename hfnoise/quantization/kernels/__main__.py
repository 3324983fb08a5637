"""`python -m hfnoise.quantization.kernels [build | status]`: compile the kernels, or say what is in use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hfnoise.quantization.kernels.bit_planes import check_library
from hfnoise.quantization.kernels.building import BuildError, build
from hfnoise.quantization.kernels.library import LEVELS, load
from hfnoise.quantization.kernels.selection import status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if nothing could be compiled."""
    parser = argparse.ArgumentParser(prog="python -m hfnoise.quantization.kernels", description=__doc__)
    parser.add_argument("command", choices=["build", "status"])
    parser.add_argument("--folder", type=Path, help="where to compile to (build); by default the cache folder")
    given = parser.parse_args(arguments)
    if given.command == "status":
        found = status()
        print(f"{f'compiled kernels, {found.level}' if found.compiled else 'torch'}: {found.reason}")
        return 0
    try:
        library = load(build(given.folder, rebuild=True))
        check_library(library)
    except BuildError as error:
        print(f"The kernels cannot be compiled: {error}", file=sys.stderr)
        return 1
    print(f"{library.path} ({LEVELS[library.level]})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
