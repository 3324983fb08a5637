"""What libraries refuse, as a text for the page."""

from __future__ import annotations

from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import LocalEntryNotFoundError

from hfnoise.errors import UsageError

# What libraries raise for what they cannot do; anything else is a fault of ours, and is shown as one.
REFUSALS = (ValueError, TypeError, OSError, ImportError, RuntimeError, UsageError)
_MOST_CHARACTERS = 600


def in_words(error: BaseException) -> str:
    """Return the message of an error on one line, and what may be the cause where the Hub's library does not say."""
    said = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (ValueError, OSError, UsageError)):
        said = f"{type(error).__name__}: {said}"  # seldom written for readers
    return said[:_MOST_CHARACTERS] + _hint(error)


def _hint(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return ""
    if HF_HUB_OFFLINE:
        return " HF_HUB_OFFLINE is set here: only what is in the cache can be loaded."
    # diffusers says of a Hub that is out of reach that the file does not exist.
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, LocalEntryNotFoundError):
        cause = cause.__cause__ or cause.__context__
    return "" if cause is None else " The Hub cannot be reached from here, and it is not in the cache."
