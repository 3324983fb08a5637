"""The sum over a batch that arrives in parts: sum exp(-loss / dr_beta), relative to an offset that may move."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# exp of it bounds the terms, so that gradients summed with them stay far from the limits of float16 (65504).
_HEADROOM = 4.0


@dataclass
class BatchLogSum:
    """Sums exp(exponent - offset) over the parts of a batch in float64; the offset follows the largest exponent.

    The offset starts at the largest exponent of the first part. It moves when a later one exceeds it by more than
    `exp(4)`: whoever has summed gradients with `exp(exponent - offset)` then multiplies them by the factor that
    [`add`] returns. So no exponent overflows or loses all others, however small the temperature is.

    Example:
        >>> import torch
        >>> from hfnoise.preference.batch_log_sum import BatchLogSum
        >>> parts = BatchLogSum()
        >>> parts.add(torch.tensor([-1000.0])), parts.add(torch.tensor([-2000.0, -999.0])), parts.offset
        (1.0, 1.0, -1000.0)
        >>> round(parts.total, 4)
        3.7183
    """

    offset: float = -math.inf  # before the first part
    total: float = 0.0
    total_of_squares: float = 0.0
    base: float = 0.0

    def add(self, exponents: Tensor, base_weights: Tensor | None = None, offset_of_all: float | None = None) -> float:
        """Add a part and return the factor for what was summed before, 1 unless the offset moved.

        Args:
            exponents (`torch.Tensor` of shape `(batch,)`): -loss / dr_beta; -inf for pairs of weight 0.
            base_weights (`torch.Tensor` of shape `(batch,)`, *optional*): weights >= 0 of the pairs; 1 by default.
            offset_of_all (`float`, *optional*): offset to move to, where processes have agreed on one.
        """
        exponents = exponents.detach().double().cpu()
        weights = torch.ones_like(exponents) if base_weights is None else base_weights.detach().double().cpu()
        self.base += float(weights.sum())
        offset = self.candidate(exponents) if offset_of_all is None else offset_of_all
        if offset == -math.inf:  # pairs of weight 0 only, so far and here
            return 1.0
        factor = self._move(offset)
        terms = weights * torch.exp(exponents - self.offset)
        self.total += float(terms.sum())
        self.total_of_squares += float(terms.square().sum())
        return factor

    def candidate(self, exponents: Tensor) -> float:
        """Return the offset that suits what was added so far and these exponents."""
        largest = float(exponents.max())
        if largest > self.offset + _HEADROOM:
            return largest
        return self.offset

    def _move(self, offset: float) -> float:
        factor = 1.0 if self.offset == -math.inf else math.exp(self.offset - offset)
        self.total *= factor
        self.total_of_squares *= factor**2
        self.offset = offset
        return factor
