"""What the libraries warn of, for the page: nobody reads the terminal of a Space."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _Listener(logging.Handler):
    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.found.append(record.getMessage())


@contextmanager
def collected_notes() -> Iterator[list[str]]:
    """Yield a list that gets what hfnoise warns of within the block, by either way, each once.

    Filters of warnings are of the whole process: blocks must not run beside each other, and the pages queue for that.
    """
    found: list[str] = []
    listener = _Listener(found)
    logger = logging.getLogger("hfnoise")
    logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, module=r"hfnoise|noise_space")
            yield found
    finally:
        logger.removeHandler(listener)
        found.extend(str(warning.message) for warning in caught)
        found[:] = dict.fromkeys(found)
