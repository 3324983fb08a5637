"""The compiled library, loaded by ctypes."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

from hfnoise.quantization.kernels.building import BuildError

# Of `enum Level` in bit_planes.cpp, from the slowest to the fastest.
LEVELS = ("generic", "avx2", "avx512")
_VERSION = 1


@dataclass(frozen=True)
class Library:
    """The loaded library: `functions`, where it lies, and the `level` of instructions that is used."""

    functions: ctypes.CDLL
    path: Path
    level: int


def load(path: Path, level: int | None = None) -> Library:
    """Return the library of a file, at a level of instructions: by default the highest of this machine.

    Raises:
        BuildError: if it cannot be loaded, or computes a wrong product.
        ValueError: if this machine lacks the level.
    """
    if sys.byteorder != "little":
        raise BuildError("this machine is big-endian, and the kernels are written for little-endian words")
    try:
        functions = ctypes.CDLL(str(path))
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        functions.hfnoise_weight_planes.argtypes = [pointer, size, size, integer, pointer]
        functions.hfnoise_bit_plane_product.argtypes = [
            pointer, size, size, integer, pointer, size, integer,
            pointer, pointer, pointer, pointer, pointer, integer, integer,
        ]  # fmt: skip
        functions.hfnoise_quantize_rows.argtypes = [
            pointer, size, size, integer, integer, ctypes.c_float, ctypes.c_float,
            pointer, integer, pointer, pointer, pointer, integer, integer,
        ]  # fmt: skip
        functions.hfnoise_rotate_gradients.argtypes = [
            pointer, pointer, size, size, integer, pointer, integer, integer,
        ]  # fmt: skip
        functions.hfnoise_decode_rows.argtypes = [
            pointer, pointer, size, size, ctypes.c_float, pointer, integer, integer,
        ]  # fmt: skip
        functions.hfnoise_scale_sums.argtypes = [
            pointer, pointer, pointer, pointer, size, size, integer, integer,
        ]  # fmt: skip
        version, best = functions.hfnoise_bit_planes_version(), functions.hfnoise_best_level()
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
    if version != _VERSION:
        raise BuildError(f"{path} has version {version} of the interface, and this is {_VERSION}")
    if level is not None and level > best:
        raise ValueError(f"level is {LEVELS[level]!r}; this machine has {', '.join(LEVELS[: best + 1])}.")
    return Library(functions, path, best if level is None else level)
