"""How many evaluations of a network may be spent, and how many were."""

from __future__ import annotations

import math


class EvaluationBudget:
    """Counts evaluations, of all samples together, and never goes beyond what is allowed.

    Args:
        per_sample (`int`): evaluations allowed, at least 1: a prediction with or without prompt is one.
        samples (`int`): how many samples share it.

    Raises:
        TypeError, ValueError: if it is no whole number, or below 1.

    Example:
        >>> from hfnoise.latents import EvaluationBudget
        >>> budget = EvaluationBudget(50, samples=2)
        >>> budget.spend(40)
        True
        >>> budget.affordable(20), budget.spend(61), budget.per_sample_spent
        (3, False, 20)
    """

    def __init__(self, per_sample: int, samples: int = 1) -> None:
        if isinstance(per_sample, bool) or not isinstance(per_sample, int):
            raise TypeError(f"budget must be a whole number, got {per_sample!r} of type {type(per_sample).__name__}.")
        if per_sample < 1:
            raise ValueError(f"budget must be at least 1 evaluation of the network a sample, got {per_sample}.")
        self.per_sample, self.samples, self.spent = per_sample, samples, 0

    @property
    def left(self) -> int:
        """Evaluations, of all samples together, that may still be spent."""
        return self.per_sample * self.samples - self.spent

    @property
    def per_sample_spent(self) -> int:
        """Evaluations a sample; rounded up where samples had different numbers."""
        return math.ceil(self.spent / self.samples)

    def spend(self, evaluations: int) -> bool:
        """Return whether there are so many left; only then they are spent."""
        if evaluations > self.left:
            return False
        self.spent += evaluations
        return True

    def affordable(self, cost: int) -> int:
        """Return how often a cost, of all samples together, can still be paid."""
        return self.left // cost
