"""APG as published: strong guidance without saturation, on x0, with momentum, clamp and projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers.configuration_utils import register_to_config

from hfnoise.guidance import MomentumState, projected_output_update, projected_update
from hfnoise.guidance.projected import check_projection
from hfnoise.pipelines.guidance_step import GuidanceStep
from hfnoise.pipelines.guider_base import UpdateGuidance
from hfnoise.pipelines.guider_options import check_numbers

_SPACES = ("x0", "model")
# r of SDXL at 1024 x 1024 (appendix of the paper), whose latents are 4 x 128 x 128.
_SDXL_THRESHOLD, _SDXL_NUMBERS = 15.0, 4 * 128 * 128


class ProjectedGuidance(UpdateGuidance):
    """Adaptive projected guidance (APG, arXiv 2410.02416, Algorithm 1): cond + (w - 1) times the shaped update.

    Of the update, cond - uncond in x0: momentum is added, its norm is clamped, and the part that is parallel to the
    conditional x0, which only saturates the image, is scaled by `eta`.

    `diffusers.AdaptiveProjectedGuidance` differs: it works on whatever the model puts out (eps images are barely
    different from CFG, figure 12 of the paper), starts from `uncond`, and its defaults only clamp. With `eta=1` and
    neither clamp nor momentum this guider is `diffusers.ClassifierFreeGuidance`, to the bit.

    With solvers that evaluate twice per step (Heun, KDPM2) the momentum advances once. Call `guider.bind(pipe)` once:
    the noise level is needed, but for `space="model"`.

    Args:
        guidance_scale (`float`, *optional*): w, 7.5 by default.
        eta (`float`, defaults to `0.0`): what is kept of the parallel part.
        norm_threshold (`float` or `"auto"`, *optional*): r, the largest norm of the update in x0, at least 0; 0 or
            `None` is none. The paper's: 15 (SDXL), 5 (DiT), 2.5 (EDM2-S). `"auto"` is SDXL's, scaled to the size of
            the latents as a norm grows with it: 15 sqrt(d / 65536) for d numbers per sample.
        momentum (`float`, *optional*): beta in (-1, 1); 0 or `None` is none. The paper's: -0.5 (SDXL, DiT),
            -0.75 (EDM2-S).
        norm_dims (`tuple[int, ...]`, *optional*): what norm and projection run over, all but the batch by default.
        space (`str`, defaults to `"x0"`): `"model"` works on the raw output, which is not the paper's.
        guidance_rescale (`float`, defaults to `0.0`), use_original_formulation (`bool`, defaults to `False`: the
            weight is w - 1; if true it is w), start (`float`, defaults to `0.0`), stop (`float`, defaults to `1.0`),
            enabled (`bool`, defaults to `True`): of `diffusers.ClassifierFreeGuidance`.

    Raises:
        ValueError: if an option is out of range.
        TypeError: if one that is a number is given as something else.

    Example:
        >>> from hfnoise.pipelines import ProjectedGuidance
        >>> ProjectedGuidance(guidance_scale=15.0, norm_threshold=15.0, momentum=-0.5).config["eta"]
        0.0
    """

    _changes_update = True

    @register_to_config
    def __init__(
        self,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        norm_threshold: float | str | None = None,
        momentum: float | None = None,
        norm_dims: Sequence[int] | None = None,
        space: str = "x0",
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        self._set_up(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        if isinstance(norm_threshold, str) and norm_threshold != "auto":
            raise ValueError(f"norm_threshold must be a number, None or 'auto', got {norm_threshold!r}.")
        numbers = {"eta": eta, "norm_threshold": norm_threshold, "momentum": momentum}
        check_numbers(**{name: value for name, value in numbers.items() if value not in (None, "auto")})
        check_projection(eta, None if isinstance(norm_threshold, str) else norm_threshold)
        if norm_threshold == "auto" and norm_dims is not None:
            raise ValueError("norm_threshold='auto' is of whole samples; with norm_dims give a number.")
        if norm_dims is not None and not (
            isinstance(norm_dims, (list, tuple)) and all(type(one) is int for one in norm_dims)
        ):
            raise TypeError(f"norm_dims must be a list of whole numbers, got {norm_dims!r}.")
        if space not in _SPACES:
            raise ValueError(f"space must be one of {_SPACES}, got {space!r}.")
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = momentum
        self.norm_dims = None if norm_dims is None else tuple(norm_dims)
        self.space = space
        self._momentum_state = MomentumState(momentum) if momentum else None

    @property
    def _is_neutral(self) -> bool:
        return self.eta == 1.0 and not self.norm_threshold and not self.momentum

    @property
    def _needs_input(self) -> bool:
        return self.space == "x0" and not self._is_neutral

    def _reset(self) -> None:
        self._forget_updates()

    def _forget_updates(self) -> None:
        if self._momentum_state is not None:
            self._momentum_state.reset()

    def _shape(self, update: torch.Tensor | None, step: GuidanceStep) -> torch.Tensor | None:
        if self._is_neutral:
            return update
        cond, uncond = step.cond, step.uncond
        if update is not None:
            cond = cond.to(update.dtype)
            uncond = cond - update
        assert uncond is not None
        rule: Callable[..., torch.Tensor] = projected_update
        if self.space == "x0":
            rule = partial(projected_output_update, model_input=step.noisy, point=step.point)
        threshold = self.norm_threshold
        if isinstance(threshold, str):
            threshold = auto_norm_threshold(cond[0].numel())
        return rule(
            cond, uncond, eta=self.eta, norm_threshold=threshold, momentum_state=self._momentum_state,
            dims=self.norm_dims, advance=step.is_first_evaluation,
        )  # fmt: skip


def auto_norm_threshold(size: int) -> float:
    """Return what `norm_threshold="auto"` is: the paper's for SDXL, scaled as a norm grows, with the root of the size.

    Args:
        size (`int`): numbers of a sample's latents.

    Example:
        >>> from hfnoise.pipelines.projected_guider import auto_norm_threshold
        >>> auto_norm_threshold(4 * 64 * 64)
        7.5
    """
    return _SDXL_THRESHOLD * math.sqrt(size / _SDXL_NUMBERS)
