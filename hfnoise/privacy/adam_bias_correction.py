"""Adam whose second moment is freed from the variance that the privacy noise adds to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class DPAdamBC(Optimizer):
    """AdamW with the step m / sqrt(max(v - noise_variance, eps^2)): DP-AdamBC (Tang et al., arXiv 2312.14334).

    The mean gradient of a private step carries noise of variance (sigma C / B)^2 in every coordinate. Adam's second
    moment v contains it, so where the noise exceeds the gradient plain Adam divides all coordinates by the same number
    and becomes SGD with momentum. The variance is known, public and constant, so it can be subtracted after the bias
    correction of v. Departure from the paper's code: `eps` is the square root of its floor gamma', as Adam users know
    it; weight decay is decoupled.

    Formal guarantee: none needed; it reads noised gradients only (post-processing).

    Args:
        params: parameters or groups, as for any optimizer.
        noise_variance (`float`): (sigma C / B)^2, at least 0; 0 gives AdamW with `eps` as a floor instead of a
            summand.
        lr (`float`, defaults to `1e-3`): at least 0.
        betas (`tuple[float, float]`, defaults to `(0.9, 0.999)`): each in [0, 1).
        eps (`float`, defaults to `1e-4`): smallest denominator, above 0; the size of a typical gradient coordinate.
        weight_decay (`float`, defaults to `0.0`): at least 0.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.adam_bias_correction import DPAdamBC
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> weight.grad = torch.ones(1)
        >>> _ = DPAdamBC([weight], noise_variance=0.0, lr=0.5).step()
        >>> weight.data
        tensor([-0.5000])
    """

    def __init__(
        self,
        params: Any,
        noise_variance: float,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
    ) -> None:
        if not (noise_variance >= 0.0 and lr >= 0.0 and eps > 0.0 and weight_decay >= 0.0):
            raise ValueError(
                "noise_variance, lr and weight_decay must be at least 0 and eps above 0, got "
                f"{noise_variance}, {lr}, {weight_decay} and {eps}."
            )
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}.")
        self.noise_variance = noise_variance
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients in `p.grad`; returns what `closure` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, (first, second) = int(state["step"]), group["betas"]
        gradient = parameter.grad
        assert gradient is not None
        state["exp_avg"].lerp_(gradient, 1.0 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
        mean = state["exp_avg"] / (1.0 - first**step)
        variance = state["exp_avg_sq"] / (1.0 - second**step) - self.noise_variance
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.add_(mean / variance.clamp(min=group["eps"] ** 2).sqrt(), alpha=-group["lr"])
