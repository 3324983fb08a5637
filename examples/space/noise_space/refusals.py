"""What libraries refuse, as a text for the page."""

from __future__ import annotations

from huggingface_hub.constants import HF_HUB_OFFLINE

from hfnoise.errors import UsageError

# What libraries raise for what they cannot do; anything else is a fault of ours, and is shown as one.
REFUSALS = (ValueError, TypeError, OSError, ImportError, RuntimeError, UsageError)
_MOST_CHARACTERS = 600


def in_words(error: BaseException) -> str:
    """Return the message of an error on one line, and what may be the cause where the Hub's library does not say."""
    said = " ".join(str(error).split()) or type(error).__name__
    offline = HF_HUB_OFFLINE and isinstance(error, OSError)
    hint = " HF_HUB_OFFLINE is set here: only what is in the cache can be loaded." if offline else ""
    return said[:_MOST_CHARACTERS] + hint
