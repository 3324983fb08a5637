"""What a preset adds to [`AutoGuidedPipeline`]: the guider that it is named for."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from diffusers.guiders import BaseGuidance

from hfnoise.pipelines.auto_guided import AutoGuidedPipeline
from hfnoise.pipelines.guider_base import UpdateGuidance


class GuidancePreset(AutoGuidedPipeline):
    """Base of the presets: a saved guider if it is of the class, or else a new one."""

    # The guider it stands for, and what a new one is made with, beyond its defaults.
    guider_class: ClassVar[type[UpdateGuidance]]
    guider_options: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _check_class(cls, guider: BaseGuidance) -> None:
        if not cls._has_class(guider):
            raise TypeError(
                f"{cls.__name__} takes a {cls.guider_class.__name__}, with or without others inside, got "
                f"{type(guider).__name__}. AutoGuidedPipeline takes any."
            )

    @classmethod
    def _preset_guider(cls, found: Any, place: str) -> Any:
        if cls._has_class(found):
            return found
        wanted = cls.guider_class
        if found is not None:
            warnings.warn(
                f"{place} has its own {type(found).__name__}; {cls.__name__} uses {wanted.__name__} instead. "
                "For the one that is there: AutoGuidedPipeline.",
                stacklevel=4,
            )
        return wanted(**cls.guider_options)

    @classmethod
    def _has_class(cls, guider: Any) -> bool:
        stages = guider.stages if isinstance(guider, UpdateGuidance) else []
        return any(isinstance(stage, cls.guider_class) for stage in stages)
