"""LinearAG that does not diverge: estimate the update cond - uncond from the last ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfnoise.guidance.linear_coefficients import EstimateKey, LinearCoefficients
from hfnoise.guidance.tensor_math import widened

POLICIES = ("alternate", "alternate_then_estimate", "full_then_estimate")


def evaluated_steps(policy: str, num_inference_steps: int) -> tuple[bool, ...]:
    """Return per step whether the unconditional prediction is really evaluated; the first step always is.

    Args:
        policy (`str`): `"alternate"`: every second step. `"alternate_then_estimate"`: every second step of the first
            half, then none (LinearAG, arXiv 2312.12487: 25 evaluations for 20 steps).
            `"full_then_estimate"`: all of the first half, then none (what FastVideo and SGLang call LinearAG).
        num_inference_steps (`int`): T, at least 1.

    Raises:
        ValueError: for another policy, or less than one step.

    Example:
        >>> from hfnoise.guidance import evaluated_steps
        >>> sum(evaluated_steps("alternate_then_estimate", 20))
        5
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}.")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
    half = (num_inference_steps + 1) // 2
    return tuple(
        (policy == "full_then_estimate" or step % 2 == 0) and (policy == "alternate" or step < half)
        for step in range(num_inference_steps)
    )


def fit_linear_coefficients(
    updates: Sequence[Tensor], key: EstimateKey, *, order: int = 2, ridge: float = 1e-3
) -> LinearCoefficients:
    """Return least-squares coefficients of each update on the `order` updates before it, over samples and pixels.

    Departure from LinearAG (arXiv 2312.12487), which regresses the unconditional prediction on all predictions
    so far: those are nearly collinear, and on a Gaussian mixture the run diverges though R^2 is 1.000 at every step,
    since estimates are fed back and their error is multiplied by the scale. The update delta = cond - uncond is what
    matters; two numbers per step and a ridge suffice, and stay stable.

    Args:
        updates (`Sequence[torch.Tensor]`): cond - uncond of fully evaluated runs, one tensor `(samples, ...)` per
            step, in the units of the model's output.
        key ([`EstimateKey`]): of those runs; they must have as many steps.
        order (`int`, defaults to `2`): 1 or 2.
        ridge (`float`, defaults to `1e-3`): added to the diagonal, times its mean; at least 0.

    Returns:
        [`LinearCoefficients`]: the first `order` steps look at the steps that there are.

    Raises:
        ValueError: if the number of updates is not that of the key, shapes differ, or order or ridge are out of range.

    Example:
        >>> import torch
        >>> from hfnoise.guidance import EstimateKey, fit_linear_coefficients
        >>> updates = [torch.tensor([[4.0, -2.0]]), torch.tensor([[2.0, -1.0]])]
        >>> fit_linear_coefficients(updates, EstimateKey("m", "s", 2, 7.5, "00"), order=1, ridge=0.0).coefficients
        ((0.0,), (0.5,))
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}; to hold the last update (order 0) nothing is fitted.")
    if not ridge >= 0:
        raise ValueError(f"ridge must be at least 0, got {ridge}.")
    if len(updates) != key.num_inference_steps or len({update.shape for update in updates}) != 1:
        shapes = sorted({tuple(update.shape) for update in updates})
        raise ValueError(
            f"updates must be {key.num_inference_steps} tensors (one per step) of one shape, got {len(updates)} of "
            f"shapes {shapes}."
        )
    rows = []
    for step, update in enumerate(updates):
        # Two scalars from millions of products: summed in float64, on the CPU, which every device can reach.
        past = [updates[step - back].double().cpu().flatten() for back in range(1, min(order, step) + 1)]
        rows.append(_ridge_regression(past, update.double().cpu().flatten(), ridge) + [0.0] * (order - len(past)))
    return LinearCoefficients(key, tuple(tuple(row) for row in rows), ridge)


def _ridge_regression(regressors: list[Tensor], target: Tensor, ridge: float) -> list[float]:
    if not regressors:
        return []
    gram = torch.stack([torch.stack([(left * right).sum() for right in regressors]) for left in regressors])
    moments = torch.stack([(regressor * target).sum() for regressor in regressors])
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(regressors), dtype=gram.dtype)
    if not torch.isfinite(gram).all() or not torch.isfinite(moments).all():
        raise ValueError("the updates are not finite (NaN or infinity): there is nothing to fit.")
    # Runs without guidance have all-zero updates; the smallest solution is 0.
    solution: list[float] = torch.linalg.lstsq(gram, moments[:, None], driver="gelsd").solution[:, 0].tolist()
    return solution


class UpdateHistory:
    """The last updates of a run, from which the next one is estimated.

    Args:
        coefficients ([`LinearCoefficients`], *optional*): `None` holds the last update (order 0).

    Example:
        >>> import torch
        >>> from hfnoise.guidance import UpdateHistory
        >>> history = UpdateHistory()
        >>> history.append(torch.full((1, 2), 3.0))
        >>> history.estimate(step=1).tolist()
        [[3.0, 3.0]]
    """

    def __init__(self, coefficients: LinearCoefficients | None = None) -> None:
        self.coefficients = coefficients
        self._updates: list[Tensor] = []

    def append(self, update: Tensor) -> None:
        """Take up the update of a step, evaluated or estimated, of shape `(batch, ...)`; the newest comes last."""
        keep = max(1, self.coefficients.order if self.coefficients else 1)
        self._updates = [*self._updates, widened(update)][-keep:]

    def estimate(self, step: int) -> Tensor:
        """Return the estimated update of a step, float32, of the shape of those before.

        Args:
            step (`int`): from 0.

        Raises:
            ValueError: if there is no update to estimate from.
        """
        if not self._updates:
            raise ValueError(f"there is no update to estimate step {step} from: evaluate the first step of a run.")
        if self.coefficients is None:
            return self._updates[-1]
        row = self.coefficients.coefficients[step]
        if len(self._updates) < min(len(row), step):
            raise ValueError(
                f"step {step} is estimated from {min(len(row), step)} updates, and there are {len(self._updates)}: "
                "the run did not begin at step 0. Fit coefficients on runs from there, or use none: the last is held."
            )
        # Newest first, as the coefficients.
        return torch.stack([w * update for w, update in zip(row, reversed(self._updates), strict=False)]).sum(dim=0)
