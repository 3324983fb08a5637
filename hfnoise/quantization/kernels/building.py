"""Compiling `bit_planes.cpp` and `rows.cpp` on the user's machine, once, into the cache folder.

The wheel stays pure, so that it installs everywhere without a compiler; what is compiled lies in the user's cache
under a name that follows from source, compiler and machine.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("bit_planes.cpp", "rows.cpp"))
# -O3: the GEMM takes 1.7 times as long with -O2. The parts for newer processors say so themselves in the source, so
# that what is compiled runs on every machine of the architecture.
# No product is contracted with a sum: the same bits with and without FMA.
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wno-psabi",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 120  # compiling takes two
logger = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The kernels cannot be compiled, or what was compiled cannot be used; the message says why."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where compiled kernels are kept: under `HF_HOME`, or where Hugging Face's cache is without it.

    Example:
        >>> from hfnoise.quantization.kernels.building import cache_folder
        >>> cache_folder({"HF_HOME": "caches"}).parts
        ('caches', 'hfnoise', 'kernels')
    """
    home = environment.get("HF_HOME")
    if not home:
        home = os.path.join(environment.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface")
    return Path(home).expanduser() / "hfnoise" / "kernels"


def find_compiler(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the command of the C++ compiler: that of `CXX` if it is set, or the first of c++, g++, clang++.

    Raises:
        BuildError: if there is none.

    Example:
        >>> from hfnoise.quantization.kernels.building import find_compiler
        >>> find_compiler({"PATH": "", "CXX": "no-such-compiler"})
        Traceback (most recent call last):
        ...
        hfnoise.quantization.kernels.building.BuildError: CXX is 'no-such-compiler', which is not found
    """
    path = environment.get("PATH", "")
    chosen = environment.get("CXX", "").split()
    if chosen:
        if shutil.which(chosen[0], path=path) is None:
            raise BuildError(f"CXX is {' '.join(chosen)!r}, which is not found")
        return chosen
    for name in _COMPILERS:
        if shutil.which(name, path=path) is not None:
            return [name]
    raise BuildError(f"no C++ compiler found ({', '.join(_COMPILERS)}, or that of CXX)")


def build(folder: Path | None = None, rebuild: bool = False) -> Path:
    """Return the compiled library, compiling it if it is not in the cache folder.

    Atomic: it is written under another name and then renamed, so that processes which do so together do not disturb
    each other.

    Args:
        folder (`pathlib.Path`, *optional*): by default that of [`cache_folder`].
        rebuild (`bool`, defaults to `False`): compile also what is there.

    Returns:
        `pathlib.Path` of the library.

    Raises:
        BuildError: if there is no compiler, if it fails, or if the folder cannot be written or belongs to somebody
            else (whose code would be run).
    """
    folder = cache_folder() if folder is None else folder
    compiler = find_compiler()
    library = folder / f"kernels-{_key(compiler)}{'.dll' if sys.platform == 'win32' else '.so'}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if rebuild or not library.is_file():
            _compile(compiler, library)
        _check_owner(folder)
        _check_owner(library)
    except OSError as error:
        raise BuildError(f"the cache folder cannot be used: {error}") from error
    return library


def _key(compiler: list[str]) -> str:
    """Return a hash of what the library depends on."""
    parts = [
        *(source.read_bytes() for source in SOURCES),
        _output([*compiler, "--version"]).encode(),
        " ".join([*compiler, *FLAGS]).encode(),
    ]
    parts.append(f"{platform.machine()} {sys.platform}".encode())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], library: Path) -> None:
    start = time.perf_counter()
    handle, name = tempfile.mkstemp(prefix="building-", suffix=library.suffix, dir=library.parent)
    os.close(handle)
    try:
        _output([*compiler, *FLAGS, *map(str, SOURCES), "-o", name])
        os.chmod(name, 0o700)
        os.replace(name, library)
    finally:
        Path(name).unlink(missing_ok=True)
    logger.info("Compiled the kernels in %.1f s: %s", time.perf_counter() - start, library)


def _output(command: list[str]) -> str:
    """Return what a command prints; raise a BuildError with the beginning of its complaints if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler cannot be run: {error}") from error
    if done.returncode != 0:
        complaints = " ".join((done.stderr or done.stdout).split())[:300]
        raise BuildError(f"{command[0]} failed with exit status {done.returncode}: {complaints or 'no message'}")
    return done.stdout


def _check_owner(path: Path) -> None:
    """Raise unless nobody else can have written what is going to be run."""
    if not hasattr(os, "getuid"):
        return
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{path} can be written by other users, who could put their code there: chmod go-w it")
