"""4-bit bases of bitsandbytes that are trained on a CPU: kept in the layout that has gradients."""

from __future__ import annotations

from typing import Any


def keep_differentiable(model: Any) -> None:
    """Stop bitsandbytes from packing 4-bit weights for the CPU when the model is evaluated.

    On a CPU with AVX512-BF16 an evaluation rearranges them for a kernel that has no backward (bitsandbytes 0.50), and
    they stay so: an evaluation in mid-training would make the gradients of all later steps wrong, with a warning of
    torch at most. Evaluation takes the ordinary route then, as on any other CPU.

    Args:
        model (`torch.nn.Module`): to be trained; nothing happens to one without 4-bit layers.

    Raises:
        ValueError: if weights are packed already.

    Example:
        >>> from torch import nn
        >>> from hfnoise.trainers.quantized_base import keep_differentiable
        >>> keep_differentiable(nn.Linear(2, 2))
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit weights of {name!r} were packed for inference on a CPU when the model was evaluated, and "
                "have no gradients in that form. Load the model anew, give it to the Trainer before it is used, and "
                "leave precompute_ref_log_probs=True of trl.DPOTrainer out, which evaluates it at construction."
            )
        module.support_avx512bf16_for_cpu = False
