"""What a quantisation-aware run leaves behind: master checkpoints, and a packed or dense model at the end."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import TrainerCallback

from hfnoise.quantization.hf_export import dequantize, export_packed, forget_quantizer, master_layers
from hfnoise.quantization.hf_layers import swap_layers
from hfnoise.quantization.packed_linear import QuestPackedLinear

_CONFIG = "config.json"


@contextmanager
def exported(model: Any, form: str, weight_only: bool = False) -> Iterator[Any]:
    """Give a model its packed or dense layers inside of the block; afterwards it has its master weights again.

    Args:
        model (`torch.nn.Module`): with master weights.
        form (`str`): `"packed"` or `"dense"`.
        weight_only (`bool`, defaults to `False`): of [`~hfnoise.dequantize`].

    Example:
        >>> from torch import nn
        >>> from hfnoise import QuestConfig, prepare_qat
        >>> from hfnoise.trainers.qat_export import exported
        >>> model = prepare_qat(nn.Sequential(nn.Linear(8, 8)), QuestConfig(bits=1))
        >>> with exported(model, "packed"):
        ...     print(model[0].weight.dtype)
        torch.uint8
        >>> model[0].weight.dtype
        torch.float32
    """
    masters = {name: module for name, (module, _) in master_layers(model).items()}
    holder = getattr(model, "config", None)
    config = copy.deepcopy(getattr(holder, "quantization_config", None))
    try:
        if form == "packed":
            export_packed(model)
        else:
            dequantize(model, weight_only=weight_only)
        yield model
    finally:
        swap_layers(model, masters)
        forget_quantizer(model)
        if config is not None:
            holder.quantization_config = config  # type: ignore[union-attr]


def move_into_place(made: Path, folder: Path) -> None:
    """Move the files of `made` into `folder`, the configuration last: a reader sees the old model, or an error, or the
    new one, and never half of it (packed weights do not fit an old configuration: their shape is another)."""
    files = sorted((path for path in made.rglob("*") if path.is_file()), key=lambda path: path.name == _CONFIG)
    for path in files:
        target = folder / path.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


class QATExportMixin:
    """The part of [`~hfnoise.QATTrainerMixin`] that saves: checkpoints as they train, everything else exported."""

    args: Any
    model: Any
    _in_checkpoint = False
    dense_difference: dict[str, float] | None = None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._in_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save as the Trainer does, in the form of `args.export`; checkpoints, and adapters, as they are."""
        save: Any = super()._save  # type: ignore[misc]
        exports = self.args.export != "master" and self.args.should_save and not self._in_checkpoint
        if not exports or is_peft_model(self.model) or not _has_masters(self.model):
            save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.export == "dense":
            self.dense_difference = self._measured_difference()
        # Beside the target, so that moving is renaming.
        made = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
        try:
            with exported(self.model, self.args.export, self.args.weight_only):
                save(str(made), None)
            _drop_stale_weights(folder, made)
            move_into_place(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _measured_difference(self) -> dict[str, float] | None:
        """Return what a dense export computes otherwise, on the first rows of the evaluation (or training) data."""
        quantized = [one for _, one in master_layers(self.model).values() if one.activation_bits is not None]
        batch = self._first_batch() if quantized else None
        if batch is None:
            return None
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            ours = self.model(**batch)
            with exported(self.model, "dense", weight_only=True):
                dense = self.model(**batch)
        self.model.train(training)
        difference = {"rows": float(len(next(iter(batch.values()))))}
        if getattr(ours, "loss", None) is not None:
            difference |= {"loss": float(ours.loss), "dense_loss": float(dense.loss)}
        logits = ours.logits.float()
        return difference | {"relative": float((dense.logits.float() - logits).norm() / logits.norm())}

    def _first_batch(self) -> dict[str, Any] | None:
        """Return one batch without a data loader, whose iteration is a matter of all ranks."""
        data: Any = self.eval_dataset if self.eval_dataset is not None else self.train_dataset  # type: ignore[attr-defined]
        data = next(iter(data.values())) if isinstance(data, dict) else data
        if data is None or not hasattr(data, "__len__") or not len(data):
            return None
        if hasattr(data, "column_names"):
            data = self._remove_unused_columns(data, "evaluation")  # type: ignore[attr-defined]
        rows = [data[row] for row in range(min(len(data), self.args.per_device_eval_batch_size))]
        return dict(self._prepare_inputs(self.data_collator(rows)))  # type: ignore[attr-defined]


def _has_masters(model: nn.Module) -> bool:
    return any(hasattr(m, "quantization") and not isinstance(m, QuestPackedLinear) for m in model.modules())


def _drop_stale_weights(folder: Path, made: Path) -> None:
    """Remove weight files of an earlier save that the new one does not overwrite, such as shards."""
    for path in folder.glob("model*.safetensors*"):
        if not (made / path.name).exists():
            path.unlink()


class ExportPackedCallback(TrainerCallback):
    """Packs the weights of a model when training ends, for any Trainer: what is saved or pushed then is packed.

    Checkpoints of the run are master weights. All ranks pack their copy, and rank 0 saves, as ever. [`QATTrainer`]
    does this without a callback, and keeps its master weights.

    Raises:
        ValueError: at the end of training, if there is nothing to pack or weights are sharded (FSDP, ZeRO-3): then
            save the master weights and run `hfnoise pack` on the folder.

    Example:
        >>> from hfnoise import ExportPackedCallback
        >>> callback = ExportPackedCallback()  # Trainer(..., callbacks=[callback])
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse before training what could not be packed after it."""
        refuse_sharded(args, "ExportPackedCallback")
        master_layers(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Pack the model in place."""
        export_packed(model)


def refuse_sharded(args: Any, what: str) -> None:
    """Raise a ValueError if weights are going to be in pieces: FSDP, DeepSpeed."""
    if args.fsdp or args.deepspeed or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            f"{what} needs whole weights, and FSDP or DeepSpeed shard them. Save master weights (export='master') and "
            "run `hfnoise pack` on the folder."
        )
