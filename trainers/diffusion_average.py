"""An average of the weights over training, kept beside them, evaluated and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

AVERAGE_FILE = "ema.safetensors"


class WeightAverage(TrainerCallback):
    """Keeps diffusers' `EMAModel` of what is trained: every optimizer step moves it by 1 - decay.

    Args:
        decay (`float`): in (0, 1); in the first steps less, as in `EMAModel`: (1 + n) / (10 + n) after n of them.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._average: EMAModel | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin with the weights the run begins with; a resumed run has loaded its average."""
        if state.global_step == 0 or self._average is None:
            self.start(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Move the average."""
        if self._average is not None:
            self._average.step(list(trained(model).values()))

    def start(self, model: nn.Module) -> None:
        """Set the average to the weights of the model."""
        self._average = EMAModel(list(trained(model).values()), decay=self.decay, foreach=True)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Have the model compute with the average inside, and with its own weights, to the bit, afterwards."""
        if self._average is None:
            yield
            return
        parameters = list(trained(model).values())
        kept = [one.detach().clone() for one in parameters]
        self._average.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for one, value in zip(parameters, kept, strict=True):
                    one.copy_(value)

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write the average by the names of the weights; before the first step there is none."""
        if self._average is None:
            return
        shadows = zip(trained(model), self._average.shadow_params, strict=True)
        steps = {"format": "pt", "optimization_step": str(self._average.optimization_step)}
        save_file({name: one.contiguous() for name, one in shadows}, folder / AVERAGE_FILE, metadata=steps)

    def load(self, folder: Path, model: nn.Module) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is missing, or is of other weights.
        """
        file = folder / AVERAGE_FILE
        if not file.is_file():
            raise ValueError(
                f"checkpoint {str(folder)!r} has no {AVERAGE_FILE}, and ema_decay is {self.decay}: it was written "
                "without an average. Resume without ema_decay, or start a new run from its weights."
            )
        self.start(model)
        average = self._average
        assert average is not None
        try:
            with safe_open(file, framework="pt") as archive:
                stored = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
                step = int((archive.metadata() or {})["optimization_step"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{str(file)!r} is damaged ({error}). Use an older checkpoint.") from None
        # All is compared before anything is copied: an average that is half another's would be nobody's.
        wanted = {name: one.shape for name, one in trained(model).items()}
        if {name: one.shape for name, one in stored.items()} != wanted:
            raise ValueError(f"{str(file)!r} is the average of other weights than those that are trained here.")
        for name, one in zip(wanted, average.shadow_params, strict=True):
            one.copy_(stored[name])
        average.optimization_step = step


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}
