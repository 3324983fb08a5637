"""Which route products of 1 and 2 bits take on this machine, and why: found out at first use."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache

from hfnoise.quantization.kernels.bit_planes import check_library
from hfnoise.quantization.kernels.building import BuildError, build
from hfnoise.quantization.kernels.library import LEVELS, Library, load

SWITCH = "HFNOISE_KERNELS"
_CHOICES = {"": None, "1": None, **{name: number for number, name in enumerate(LEVELS)}}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelStatus:
    """Which route products of 1 and 2 bits take.

    Args:
        compiled (`bool`): by the compiled kernels; otherwise by torch, with the same result.
        level (`str` or `None`): the instructions in use: `"generic"`, `"avx2"` or `"avx512"`.
        reason (`str`): why; of compiled kernels, where they lie.
    """

    compiled: bool
    level: str | None
    reason: str


def status() -> KernelStatus:
    """Return whether the compiled kernels are in use and why; compiles them if that was not tried yet.

    Raises:
        ValueError: if the environment variable HFNOISE_KERNELS holds what is no choice, or what this machine lacks.

    Example:
        >>> from hfnoise.quantization.kernels import status
        >>> status().compiled in (True, False)
        True
    """
    found = _load()
    if isinstance(found, str):
        return KernelStatus(False, None, found)
    return KernelStatus(True, LEVELS[found.level], str(found.path))


def library() -> Library | None:
    """Return the loaded library, or `None` where torch does the work; see [`status`] for the reason.

    Raises:
        ValueError: as [`status`].
    """
    found = _load()
    return None if isinstance(found, str) else found


@cache
def _load() -> Library | str:
    """Return the library, or the reason why there is none, which is logged; tried once per process."""
    switch = os.environ.get(SWITCH, "")
    if switch == "0":
        return f"switched off by {SWITCH}=0"
    if switch not in _CHOICES:
        raise ValueError(
            f"{SWITCH} is {switch!r}; allowed are 0 (torch only), 1 (the default: whatever the machine has), "
            f"{', '.join(LEVELS)}."
        )
    try:
        found = load(build(), _CHOICES[switch])
        check_library(found)
    except BuildError as error:
        reason = f"{error}; products of 1 and 2 bits are computed by torch: the same result, more slowly"
        logger.warning("No compiled kernels: %s. (%s=0 says so on purpose.)", reason, SWITCH)
        return reason
    return found
