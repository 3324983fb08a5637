"""The arithmetic of a private step: clipped sum over units, one reduction, noise once, division by a constant."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hfnoise.privacy.clipping import clip_per_unit

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class PrivateStep:
    """Sums the clipped gradients of the units of a step, adds noise and leaves the result in `p.grad`.

    Algorithm 1 of Abadi et al. (arXiv 1607.00133) with the expected batch size in the denominator: the number of units
    that a Poisson batch really holds is private.

    Formal guarantee: if a unit is added or removed, `sum` moves by at most `clip_norm`, whatever the other units are,
    because each per-unit gradient depends on its unit alone (which `dp_check` tests) and is clipped before it is
    added. With noise of standard deviation `noise_multiplier * clip_norm` per coordinate a step is then a Poisson
    subsampled Gaussian mechanism.

    Args:
        parameters (`dict[str, nn.Parameter]`): the trainable parameters in a fixed order, which is that of the noise.
        clip_norm (`float`): C > 0.
        clipping (`str`): `"flat"`, `"auto"` or `"per_layer"`.
        expected_batch_size (`int`): B.
        noise (`Callable[[int], Tensor]`): standard normal draws for a step, float64 on the CPU, one for each number in
            the parameters.
        noise_multiplier (`float`): sigma >= 0.
        accumulation_dtype (`str`): of the sum.
        device (`torch.device`): where the sum is reduced over processes.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        clip_norm: float,
        clipping: str,
        expected_batch_size: int,
        noise: Callable[[int], Tensor],
        noise_multiplier: float,
        accumulation_dtype: str,
        device: torch.device,
    ) -> None:
        self._parameters, self._clip_norm, self._clipping = parameters, clip_norm, clipping
        self._expected_batch_size, self._noise, self._noise_multiplier = expected_batch_size, noise, noise_multiplier
        self._dtype, self._device = _DTYPES[accumulation_dtype], device
        self._sums: dict[str, Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """Forget the sum of the step before."""
        for name, parameter in self._parameters.items():
            if name in self._sums and self._sums[name].device == parameter.device:
                self._sums[name].zero_()
            else:
                self._sums[name] = torch.zeros_like(parameter, dtype=self._dtype, requires_grad=False)

    def add(self, gradients: dict[str, Tensor]) -> None:
        """Clip the gradients of some units and add them.

        Args:
            gradients (`dict[str, Tensor[units, *shape]]`): by parameter.
        """
        clip_per_unit(gradients, self._clip_norm, self._clipping, accumulate_into=self._sums, dtype=self._dtype)

    def finish(self, step: int) -> None:
        """Reduce the sum over the processes, add the noise of the step and set `p.grad`."""
        sums = list(self._sums.values())
        flat = torch.cat([part.flatten().to(self._device) for part in sums])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
        # Every process draws the same noise: it is added once, after the sum over the processes.
        scale = self._noise_multiplier * self._clip_norm
        total = flat.double()
        if scale > 0.0:
            total.add_(self._noise(step).to(self._device), alpha=scale)
        total /= self._expected_batch_size
        for parameter, part in zip(self._parameters.values(), total.split([s.numel() for s in sums]), strict=True):
            parameter.grad = part.view_as(parameter).to(device=parameter.device, dtype=parameter.dtype)
