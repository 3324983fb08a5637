"""One step of a guided run, as the parts of a guider see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hfnoise.guidance import DenoisingPoint
from hfnoise.pipelines.model_inputs import predicted_part
from hfnoise.pipelines.scheduler_points import denoising_point, is_first_evaluation


@dataclass
class GuidanceStep:
    """One step of a run, as the parts of a guider see it.

    Args:
        number (`int`): of the step, from 0.
        num_inference_steps (`int`): T.
        guidance_scale (`float`): of the run.
        cond (`torch.Tensor` of shape `(batch, ...)`): conditional output of the model.
        uncond (`torch.Tensor`, *optional*): unconditional one, of all samples; that of a sample which was not
            evaluated is its conditional one. `None` if none was.
        guided (`torch.Tensor` of shape `(batch,)`): boolean, the samples that are guided.
        model_input (`torch.Tensor`, *optional*): what was denoised.
        scheduler, denoiser: of the run, where known.
        timestep: of the step.
        uncond_rows (`int`): how many samples the unconditional prediction was evaluated for.
        similarity (`torch.Tensor` of shape `(batch,)`, *optional*): what was measured, NaN where nothing was.
    """

    number: int
    num_inference_steps: int
    guidance_scale: float
    cond: torch.Tensor
    uncond: torch.Tensor | None
    guided: torch.Tensor
    model_input: torch.Tensor | None = None
    scheduler: Any = None
    denoiser: Any = None
    timestep: Any = None
    uncond_rows: int = 0
    similarity: torch.Tensor | None = None
    _point: DenoisingPoint | None = field(default=None, repr=False)

    @property
    def point(self) -> DenoisingPoint:
        """Signal and noise of this step."""
        if self._point is None:
            self._point = denoising_point(self.scheduler, self.timestep)
        return self._point

    @property
    def predicts_noise(self) -> bool:
        """Whether the output of the model is eps."""
        return self.scheduler.config.get("prediction_type") == "epsilon"

    @property
    def noisy(self) -> torch.Tensor:
        """The part of the model's input that the prediction is of.

        Raises:
            ValueError: if the model predicts more than it was given.
        """
        assert self.model_input is not None
        noisy = self.model_input[predicted_part(self.model_input, self.cond)]
        if noisy.shape != self.cond.shape:
            raise ValueError(
                f"the model was given {tuple(self.model_input.shape)} and predicted {tuple(self.cond.shape)}, "
                "which is more: x0 does not follow. Use space='model'."
            )
        return noisy

    @property
    def is_first_evaluation(self) -> bool:
        """False on the second evaluation of a step (Heun, KDPM2)."""
        return self.scheduler is None or is_first_evaluation(self.scheduler)
