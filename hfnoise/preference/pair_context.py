"""What a pair loss may look at besides the margin."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PairContext:
    """Everything a pair loss receives besides the margins; all tensors are of shape `(batch,)`.

    Args:
        flip_rate (`float` or `torch.Tensor`, *optional*): probability that the label is flipped, in [0, 0.5).
        beta (`float`, defaults to `1.0`): the scale already contained in the margins.
        chosen_scores (`torch.Tensor`, *optional*): log pi_theta - log pi_ref of the chosen completion, nats.
        rejected_scores (`torch.Tensor`, *optional*): the same of the rejected completion.
        chosen_lengths (`torch.Tensor`, *optional*): number of completion tokens, end of sequence included.
        rejected_lengths (`torch.Tensor`, *optional*): the same of the rejected completion.
        mode (`str`, defaults to `"train"`): `"train"` or `"eval"`.
        holder_gamma (`float`, defaults to `2.0`): exponent of `holder`, above 0; 2 is the paper's choice.
        sym_temperature (`float`, defaults to `1.0`): unit of margin of `sym`, above 0.
        ropo_alpha (`float`, defaults to `14.0`): weight of the symmetric part in `ropo`, above 0; 14 in SymPO's runs.
        robust_rescale (`bool`, defaults to `False`): multiply `robust` by (1 - 2 flip_rate).
        robust_margin_limit (`float`, *optional*): margin above which `robust` is constant; off by default.

    Raises:
        ValueError: if an option is outside its range.

    Example:
        >>> from hfnoise.preference import PairContext
        >>> PairContext(flip_rate=0.2).holder_gamma
        2.0
    """

    flip_rate: float | Tensor | None = None
    beta: float = 1.0
    chosen_scores: Tensor | None = None
    rejected_scores: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    mode: str = "train"
    holder_gamma: float = 2.0
    sym_temperature: float = 1.0
    ropo_alpha: float = 14.0
    robust_rescale: bool = False
    robust_margin_limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("holder_gamma", "sym_temperature", "ropo_alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")
        limit = self.robust_margin_limit
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"robust_margin_limit must be a finite margin above 0, or None, got {limit!r}.")

    def required_flip_rate(self, margins: Tensor) -> float | Tensor:
        """Return the flip rate, a tensor in the dtype of the margins if given per example.

        Raises:
            ValueError: if there is none.
        """
        if self.flip_rate is None:
            raise ValueError(
                "this pair loss needs a flip rate and got none: give flip_rate in [0, 0.5), or use 'sym' or 'holder', "
                "which need none."
            )
        if isinstance(self.flip_rate, Tensor):
            return self.flip_rate.to(margins.dtype)
        return self.flip_rate
