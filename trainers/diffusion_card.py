"""The card of a trained denoiser."""

from __future__ import annotations

from typing import Any


class DiffusionCardMixin:
    """The part of [`~hfnoise.DiffusionTrainer`] that writes `README.md`."""

    args: Any
