"""What a private training left behind: weights that are finite, that moved, and that come back from the disk."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor


def check_result(model: Any, before: dict[str, Tensor], learning_rates: list[float]) -> None:
    """Raise RuntimeError if the trained parameters are not finite, did not move, or do not come back when saved.

    Privacy engines that patch layers have lost weights without a word; a user finds out when the budget is spent.

    Args:
        model (`nn.Module`): after training.
        before (`dict[str, Tensor]`): the trained parameters before the first step; empty if no step was taken.
        learning_rates (`list[float]`): of the steps as far as they were logged; if all are 0, as in a warm-up that is
            longer than the training, nothing is expected to move.
    """
    parameters = dict(model.named_parameters())
    for name in before:
        if not bool(torch.isfinite(parameters[name]).all()):
            raise RuntimeError(
                f"after training, {name} is not finite. The noise cannot do that: lower the learning rate. The ledger "
                "keeps the steps that were taken."
            )
    still = [name for name, value in before.items() if torch.equal(parameters[name].detach().cpu(), value)]
    if before and any(rate > 0.0 for rate in learning_rates) and len(still) == len(before):
        raise RuntimeError(
            "no trained parameter has changed: the optimizer does not hold the trainable parameters. Leave the "
            "optimizer to the Trainer, or make it after the adapter was added. The ledger keeps the steps."
        )
    if before and is_peft_model(model):
        _check_adapter(model)


def _check_adapter(model: Any) -> None:
    """Save the trained adapters to a temporary folder and compare what is read back."""
    wrong: list[str] = []
    # Not those that rest: TRL adds a frozen copy named "ref", whose tensors have the same names.
    for adapter in model.active_adapters:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says again what it will say when the user saves
            expected = get_peft_model_state_dict(model, adapter_name=adapter)
            model.save_pretrained(folder, selected_adapters=[adapter])
            files = list(Path(folder).rglob("adapter_model.safetensors"))
            found = {name: value for file in files for name, value in load_file(file).items()}
        wrong += [
            name for name, value in expected.items() if name not in found or not torch.equal(found[name], value.cpu())
        ]
    if wrong:
        raise RuntimeError(f"the saved adapter does not hold the trained weights: {', '.join(wrong[:5])} differ.")
