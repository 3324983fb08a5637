"""The rows a denoiser is trained on: `latents`, and columns named like the arguments of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hfnoise.latents.hf_time_free_unet import text_widths

LATENTS = "latents"
STATES = "encoder_hidden_states"
# How diffusers' denoisers call what they denoise; the time is `timestep` in all of them.
_INPUT_NAMES = ("sample", "hidden_states")
_TIME_NAME = "timestep"
# Denoisers that predict noise - x0 at flow matching, and what their pipelines multiply the scheduler's time by (0 to
# 1000) before they pass it on. Others (Lumina2, Z-Image, HiDream) predict x0 - noise, or count the time backwards.
_FLOW_TIME_SCALES = {
    "UNet2DModel": 1.0,
    "UNet2DConditionModel": 1.0,
    "SD3Transformer2DModel": 1.0,
    "WanTransformer3DModel": 1.0,
    "LTXVideoTransformer3DModel": 1.0,
    "HunyuanVideoTransformer3DModel": 1.0,
    "CogView4Transformer2DModel": 1.0,
    "FluxTransformer2DModel": 1e-3,
    "ChromaTransformer2DModel": 1e-3,
    "QwenImageTransformer2DModel": 1e-3,
    "AuraFlowTransformer2DModel": 1e-3,
}


@dataclass(frozen=True)
class DenoiserInputs:
    """How a denoiser is called.

    Args:
        name (`str`): of its class, for messages.
        input_name (`str`): its argument for the noisy latents, `"sample"` or `"hidden_states"`.
        names (`frozenset[str]`): its other arguments.
        required (`frozenset[str]`): those of them without default.
        source (`str`): what makes such columns, for messages.
    """

    name: str
    input_name: str
    names: frozenset[str]
    required: frozenset[str]
    source: str = "hfnoise.trainers.diffusion_latents.precompute_latents makes them from images and captions."

    @classmethod
    def of(cls, model: Any, timed: bool = True) -> DenoiserInputs:
        """Return how a model of diffusers is called.

        Args:
            model (`diffusers.ModelMixin`): the denoiser.
            timed (`bool`, defaults to `True`): whether it must take a timestep.

        Raises:
            TypeError: if it has no such arguments.
        """
        parameters = inspect.signature(type(model).forward).parameters
        kind = type(model).__name__
        found = [name for name in _INPUT_NAMES if name in parameters]
        if not found or (timed and _TIME_NAME not in parameters):
            raise TypeError(
                f"{kind}.forward has no argument {' or '.join(_INPUT_NAMES)}, or no {_TIME_NAME}: it is no denoiser "
                "of diffusers. Give pipe.unet or pipe.transformer."
            )
        others = {
            name: one
            for name, one in parameters.items()
            if name not in ("self", found[0], _TIME_NAME, "return_dict")
            and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        }
        required = frozenset(name for name, one in others.items() if one.default is one.empty)
        return cls(kind, found[0], frozenset(others), required)

    def check_columns(self, columns: Sequence[str], where: str) -> None:
        """Raise if columns are missing, or are nothing that the denoiser takes.

        Raises:
            ValueError: naming the columns, and what the denoiser takes.
        """
        tops = {name.partition(".")[0] for name in columns if name != LATENTS}
        missing = sorted(({LATENTS} - set(columns)) | (self.required - tops))
        if missing:
            raise ValueError(
                f"{where} has no column {', '.join(missing)}, which {self.name} needs; it has {sorted(columns)}. "
                f"{self.source}"
            )
        strange = sorted(name for name in columns if name != LATENTS and name.partition(".")[0] not in self.names)
        if strange:
            raise ValueError(
                f"{where} has columns {strange}, which are no arguments of {self.name}.forward; it takes "
                f"{sorted(self.names)}. Remove them: dataset.remove_columns({strange})."
            )

    def arguments(self, conditions: dict[str, Tensor]) -> dict[str, Any]:
        """Return columns as keyword arguments; `added_cond_kwargs.text_embeds` goes into a dictionary."""
        result: dict[str, Any] = {}
        for name, value in conditions.items():
            top, dot, rest = name.partition(".")
            if dot:
                result.setdefault(top, {})[rest] = value
            else:
                result[top] = value
        return result


class DiffusionCollator:
    """Stacks rows of latents and conditions into a batch: floats in float32, whole numbers and masks as they are.

    Raises:
        ValueError: if rows have different columns or shapes, or numbers that are not finite.

    Example:
        >>> import torch
        >>> from hfnoise.trainers.diffusion_rows import DiffusionCollator
        >>> DiffusionCollator()([{"latents": torch.zeros(4, 8, 8)}] * 2)["latents"].shape
        torch.Size([2, 4, 8, 8])
    """

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns = {tuple(sorted(row)) for row in rows}
        if len(columns) > 1:
            raise ValueError(
                f"rows of one batch have different columns: {sorted(columns)}. Give every row the same: a caption "
                "that is missing as the empty prompt."
            )
        return {name: self._stack(name, [row[name] for row in rows]) for name in rows[0]}

    def _stack(self, name: str, values: list[Any]) -> Tensor:
        try:
            tensors = [torch.as_tensor(value) for value in values]
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"column {name} holds {type(values[0]).__name__}, not numbers of one shape; a denoiser takes "
                f"numbers. Remove it: dataset.remove_columns([{name!r}])."
            ) from None
        shapes = {tuple(one.shape) for one in tensors}
        if len(shapes) > 1:
            raise ValueError(
                f"rows of one batch have {name} of different shapes: {sorted(shapes)}. Bring the images to one size "
                "before encoding them, or pad the prompts to one length."
            )
        batch = torch.stack(tensors)
        if not batch.is_floating_point():
            return batch
        batch = batch.to(torch.float32)
        if not bool(batch.isfinite().all()):
            raise ValueError(
                f"{name} of a row is NaN or infinite. An autoencoder in float16 can overflow (SDXL's does): encode in "
                "float32, or look for broken images."
            )
        return batch


def check_rows(dataset: Any, where: str, inputs: DenoiserInputs, model: Any) -> None:
    """Look at the columns and the first row of a dataset, or of each of a dictionary of them; a stream is not read.

    Raises:
        ValueError: if the denoiser does not take them, or there are none.
    """
    if isinstance(dataset, dict) and where == "train_dataset":
        raise ValueError(
            f"train_dataset is a dictionary of {sorted(dataset)}; a run is on one dataset. Give one of them, such as "
            f"dataset[{next(iter(dataset), 'train')!r}], or join them: datasets.concatenate_datasets."
        )
    if isinstance(dataset, dict):
        for name, one in dataset.items():
            check_rows(one, f"{where}[{name!r}]", inputs, model)
        return
    if dataset is None or isinstance(dataset, torch.utils.data.IterableDataset):
        return
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        inputs.check_columns(columns, where)
    if not hasattr(dataset, "__len__"):
        return
    if not len(dataset):
        raise ValueError(f"{where} has no rows. Look at what filtered them out, or at its split.")
    row = dataset[0]
    inputs.check_columns(list(row), where)
    if isinstance(model, UNet2DConditionModel) and STATES in row:
        _check_states(tuple(torch.as_tensor(row[STATES]).shape), where, inputs.name, text_widths(model))
    shape = tuple(torch.as_tensor(row[LATENTS]).shape)
    channels = getattr(model.config, "in_channels", None)
    # Fewer dimensions are those of packed latents.
    if len(shape) >= 3 and isinstance(channels, int) and shape[0] != channels:
        raise ValueError(
            f"the latents of {where} have the shape {shape}, and {inputs.name} takes {channels} channels first. "
            "Encode with the autoencoder of the same pipeline."
        )


def _check_states(shape: tuple[int, ...], where: str, name: str, widths: frozenset[int]) -> None:
    if len(shape) == 2 and (not widths or shape[-1] in widths):
        return
    wanted = " or ".join(map(str, sorted(widths)))
    raise ValueError(
        f"the {STATES} of {where} have the shape {shape}, and {name} takes (tokens, {wanted or 'width'}), by its "
        "cross_attention_dim. Encode the prompts with the text encoder of the same pipeline, one row each."
    )


def flow_time_scale(model: Any) -> float:
    """Return what a flow-matching scheduler's timesteps, from 0 to 1000, are multiplied by for a denoiser.

    Raises:
        ValueError: for a denoiser whose convention is not known here.
    """
    for kind in type(model).__mro__:
        if kind.__name__ == "SanaTransformer2DModel":
            return float(model.config.timestep_scale)
        if kind.__name__ in _FLOW_TIME_SCALES:
            return _FLOW_TIME_SCALES[kind.__name__]
    raise ValueError(
        f"{type(model).__name__} at flow matching: which sign it predicts and how it counts time is not known here, "
        f"only for {sorted([*_FLOW_TIME_SCALES, 'SanaTransformer2DModel'])}. Override `denoise` of the trainer to "
        "return noise - x0 for a timestep from 0 to 1000."
    )
