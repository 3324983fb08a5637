"""How a denoiser is saved, resumed and pushed: in the formats that stock diffusers loads."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.trainer_utils import HubStrategy

from hfnoise.trainers.checkpoints import check_identity, last_complete_checkpoint
from hfnoise.trainers.diffusion_average import WeightAverage

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


class DiffusionSavingMixin:
    """The part of [`~hfnoise.DiffusionTrainer`] that writes and reads folders."""

    args: Any
    model: Any
    accelerator: Any
    state: Any
    average: WeightAverage | None
    _in_checkpoint = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does. A resumed run is the run that was not interrupted, to the bit.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint; `True` is the last whole one.
            *args, **kwargs: of the Trainer's method.

        Raises:
            ValueError: for a damaged checkpoint, or one of another run.
        """
        return super().train(self.checkpoint_to_resume(resume_from_checkpoint), *args, **kwargs)  # type: ignore[misc]

    def checkpoint_to_resume(self, given: str | bool | None) -> str | None:
        """Return the folder of a checkpoint of this run; `None` for a run from the start.

        Args:
            given (`str` or `bool`, *optional*): a checkpoint; `True` is the last whole one. On a command line it is a
                word, `"true"` or `"false"`.

        Raises:
            ValueError: for a damaged checkpoint, one of another run, or if there is none.
        """
        word = str(given).lower()
        if not given or word == "false":
            return None
        folder = last_complete_checkpoint(self.args.output_dir) if word == "true" else str(given)
        check_identity(folder, self.identity())
        return folder

    if TYPE_CHECKING:

        def identity(self) -> dict[str, Any]:
            """Of the Trainer: what a checkpoint must agree on with the run that it is resumed by."""

    def _is_adapter(self) -> bool:
        return bool(getattr(self.model, "_hf_peft_config_loaded", False))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._in_checkpoint = False

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.average is not None and self.args.should_save:
            self.average.save(Path(output_dir), self._denoiser())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the average where there is one, except into checkpoints, which go on from the weights themselves."""
        # A checkpoint that cannot be resumed is there to be used.
        resumable = self._in_checkpoint and not self.args.save_only_model
        self._write(output_dir or self.args.output_dir, averaged=not resumable)

    def _write(self, output_dir: str, averaged: bool) -> None:
        if not self.args.should_save:
            return
        folder, model = Path(output_dir), self._denoiser()
        folder.mkdir(parents=True, exist_ok=True)
        with self.average.in_place_of(model) if averaged and self.average is not None else nullcontext():
            if self._is_adapter():
                save_adapter(model, folder)
            else:
                model.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, denoiser = Path(resume_from_checkpoint), self._denoiser()
        load_weights(denoiser, folder)
        if self.average is not None and not self.args.save_only_model:
            self.average.load(folder, denoiser)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        if self.average is not None and self.args.save_only_model:
            self.average.start(self._denoiser())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            # The stock method copies the files of transformers only, and a denoiser's have other names.
            self._write(self.args.output_dir, averaged=True)
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _denoiser(self) -> Any:
        """Return the model itself, without what distributed training and compilation put around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def trained_adapter(model: Any) -> str:
    """Return the name of the adapter that is trained, of those that a model has.

    Raises:
        ValueError: if there are several, or something else is trained too, which a file of LoRA weights has no place
            for.
    """
    owners = {name: _adapter_of(name) for name, one in model.named_parameters() if one.requires_grad}
    lost = next((name for name, owner in owners.items() if owner is None), None)
    if lost is not None:
        raise ValueError(
            f"{lost} is trainable beside the adapter, and a file of LoRA weights has no place for it: it would be "
            "lost. Freeze it (model.requires_grad_(False) before add_adapter; no bias and no modules_to_save in "
            "LoraConfig), or train the model without an adapter."
        )
    # Of a frozen model it is the only one.
    found = sorted(set(owners.values()) or set(model.peft_config))
    if len(found) > 1:
        raise ValueError(
            f"the model has several adapters to train: {found}. A run trains and saves one; freeze or delete the "
            f"others: model.delete_adapters({found[1:]})."
        )
    return str(found[0])


def _adapter_of(name: str) -> str | None:
    parts = name.split(".")
    return next((after for part, after in zip(parts, parts[1:], strict=False) if part.startswith("lora_")), None)


def save_adapter(model: Any, folder: Path) -> None:
    """Write LoRA weights as `pipe.load_lora_weights(folder)` reads them."""
    adapter = trained_adapter(model)
    layers, metadata = get_peft_model_state_dict(model, adapter_name=adapter), model.peft_config[adapter]
    if _prefix(model) == "unet":
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata.to_dict()
        )
    else:
        SD3LoraLoaderMixin.save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata.to_dict()
        )


def load_weights(model: Any, folder: Path) -> None:
    """Read the weights, or LoRA weights, of a folder into a model.

    Raises:
        ValueError: if they are missing, or of another model.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        file = folder / ADAPTER_FILE
        if not file.is_file():
            raise ValueError(f"{str(folder)!r} has no {ADAPTER_FILE}, and this run trains an adapter.")
        start, adapter = _prefix(model) + ".", trained_adapter(model)
        layers = {name.removeprefix(start): one for name, one in load_file(file).items()}
        expected = get_peft_model_state_dict(model, adapter_name=adapter)
        _check_shapes(folder, {name: one.shape for name, one in layers.items()}, expected)
        set_peft_model_state_dict(model, layers, adapter_name=adapter)
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} has no config.json, so it is not a saved {type(model).__name__}.")
    try:
        loaded = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype).state_dict()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{str(folder)!r} cannot be read as a saved {type(model).__name__}: {error}") from error
    # What a file lacks diffusers leaves on the device without data.
    stored = {name: one.shape for name, one in loaded.items() if not one.is_meta}
    _check_shapes(folder, stored, model.state_dict())
    model.load_state_dict(loaded)


def _check_shapes(folder: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    here = {name: one.shape for name, one in expected.items()}
    for name in sorted(set(stored) | set(here)):
        if stored.get(name) != here.get(name):
            there, wanted = (tuple(one[name]) if name in one else "absent" for one in (stored, here))
            raise ValueError(
                f"{str(folder)!r} is of another model: tensor {name!r} of shape {there} there, {wanted} here."
            )


def _prefix(model: Any) -> str:
    """Return the name of the pipeline's component, which stands before the names of LoRA weights."""
    return "unet" if isinstance(model, UNet2DConditionModel) else "transformer"
