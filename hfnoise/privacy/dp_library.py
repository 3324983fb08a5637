"""The joint with Google's dp-accounting, an optional dependency that is imported when it is first used."""

from __future__ import annotations

import logging
from typing import Any

# Logged once for each Rényi order whose series does not converge. Such an order is left out of the minimum over the
# orders, which keeps the bound valid; hundreds of lines about it would hide the warnings that matter.
_UNCONVERGED_ORDER = "_compute_log_a_frac failed to converge"


def dp_accounting() -> Any:
    """Return the module `dp_accounting`, with its warnings about Rényi orders left out silenced.

    Raises:
        ImportError: if it is not installed.

    Example:
        >>> from hfnoise.privacy.dp_library import dp_accounting
        >>> dp_accounting().GaussianDpEvent(2.0).noise_multiplier
        2.0
    """
    try:
        import dp_accounting as library
    except ImportError as error:
        raise ImportError(
            "Without Google's dp-accounting no epsilon can be stated, and a private run would have no guarantee: "
            "pip install 'hfnoise[dp]'"
        ) from error
    logging.getLogger("absl").addFilter(_is_no_unconverged_order)  # adding it again changes nothing
    return library


def _is_no_unconverged_order(record: logging.LogRecord) -> bool:
    return _UNCONVERGED_ORDER not in str(record.msg)
