"""Whose run a guider is in: one at a time, and afterwards nothing of it is kept but what the report needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hfnoise.pipelines.guider_base import UpdateGuidance

# The guiders, and what is inside of them, that are in the middle of a run: its state is theirs.
_BUSY: set[int] = set()
_LOCK = threading.Lock()


@contextmanager
def running(guider: UpdateGuidance, pipe: Any) -> Iterator[None]:
    """Within the block a guider works for one call of one pipeline; its scale and what it is bound to come back.

    Args:
        guider ([`UpdateGuidance`]): of the call.
        pipe: whose scheduler counts.

    Raises:
        RuntimeError: if it, or a guider inside of it, is in another such block.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from hfnoise.pipelines import AdaptiveGuidance
        >>> from hfnoise.pipelines.guider_runs import running
        >>> guider = AdaptiveGuidance()
        >>> with running(guider, DDIMScheduler()), running(guider, DDIMScheduler()):
        ...     pass
        Traceback (most recent call last):
        ...
        RuntimeError: this AdaptiveGuidance is in the middle of a guided call...
    """
    names = {id(stage) for stage in guider.stages}
    with _LOCK:
        if names & _BUSY:
            raise RuntimeError(
                f"this {type(guider).__name__} is in the middle of a guided call, whose state it holds. Finish that "
                "call first, or give each pipeline a guider of its own: copy.deepcopy(guider)."
            )
        _BUSY.update(names)
    before = guider._source, guider.guidance_scale
    guider._source, guider._step = pipe, None
    # A call that fails before its first step leaves no report of the one before.
    guider._trace, guider._rows_per_step, guider._has_guided = [], [], False
    try:
        yield
    finally:
        guider._source, guider.guidance_scale = before
        guider._step = guider._model_input = guider._denoiser = guider._rows = None
        guider._remove_hook()
        for stage in guider.stages:
            stage._forget_updates()
        with _LOCK:
            _BUSY.difference_update(names)
