"""A tap on the model that TRL's loss calls: it keeps the output of the fused LM head."""

from __future__ import annotations

from typing import Any


class ForwardTap:
    """Forwards calls to a model and keeps the first output that was made with `fused_lm_head=True`, and its labels.

    TRL's `DPOTrainer.compute_loss` has no hook between the forward pass and the loss. Passing this in the place of the
    model gives us the log-probabilities it computed, on the same graph, at no cost.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.output: Any = None
        self.labels: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        if self.output is None and kwargs.get("fused_lm_head"):
            self.output, self.labels = output, kwargs.get("labels")
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
