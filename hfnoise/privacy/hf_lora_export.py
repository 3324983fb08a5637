"""Write LoRA factors as a plain PEFT adapter, which loads without hfnoise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from hfnoise.privacy.lora_factors import LoraFactors, check_factors, check_finite

# How PEFT names modules inside a PeftModel.
_PREFIX = "base_model.model."
# Settings under which an adapter is more than the product of two factors.
_REFUSED = {
    "use_dora": "DoRA has a magnitude per output, which factors do not hold",
    "lora_bias": "biases of lora_B are not among the factors",
    "target_parameters": "adapters of bare parameters have other names",
    "trainable_token_indices": "trained tokens are not among the factors",
    "layer_replication": "replicated layers change the base model",
    "use_qalora": "QALoRA pools the inputs of A",
    "use_bdlora": "BD-LoRA stores blocks",
    "alora_invocation_tokens": "aLoRA is active after these tokens only",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base weight",
    "monteclora_config": "MonteCLoRA has variational parameters",
}
# Starts that change the base weight when the adapter is loaded, or that ask for data.
_INITIALISATIONS = ("eva_config", "corda_config", "lora_ga_config")


def save_lora_adapter(
    output_dir: str | Path,
    factors: Mapping[str, LoraFactors | tuple[Tensor, Tensor]],
    config: LoraConfig,
    scaling: float | Mapping[str, float],
    *,
    rank: int | None = None,
    extra_state: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Write `adapter_model.safetensors` and `adapter_config.json`; return what truncation left out of each layer.

    `PeftModel.from_pretrained(base, output_dir)` then computes W0 x + scaling B A x with the factors given. Ranks may
    differ by layer (`rank_pattern`); alpha is scaling x rank for each (`alpha_pattern`), with `use_rslora=False`, so
    the scaling stays what it was in training. `init_lora_weights` becomes True: of "pissa" and its like, PEFT would
    change the base weight when it loads the adapter.

    Args:
        output_dir (`str` or `Path`): made if it is not there.
        factors (`dict` of `LoraFactors` or of pairs `(lora_A, lora_B)`): by module path, with or without PEFT's
            "base_model.model.". Such as `LoraRotation.export()[0]` of every layer.
        config (`LoraConfig`): of the adapter that was trained; not changed.
        scaling (`float` or `dict` by module path): by which layers multiply B A, alpha / r in training.
        rank (`int`, *optional*): truncate every layer of a higher rank to it. Default: ranks as they are.
        extra_state (`dict` of `torch.Tensor`, *optional*): weights of `modules_to_save`, by their names in PEFT's
            adapter file.

    Returns:
        `dict[str, float]`: by module path, the Frobenius norm of what truncation left out, in units of the weight.

    Raises:
        TypeError: for factors that are not float32 or float64.
        ValueError: if there are no factors, they are not finite, or the config asks for more than factors.

    Example:
        >>> import torch
        >>> from peft import LoraConfig
        >>> from hfnoise.privacy import save_lora_adapter
        >>> factors = {"layers.0.q_proj": (torch.ones(2, 3), torch.ones(4, 2))}
        >>> save_lora_adapter("adapter", factors, LoraConfig(r=4, target_modules=["q_proj"]), scaling=2.0)
        {'layers.0.q_proj': 0.0}
        >>> LoraConfig.from_pretrained("adapter").lora_alpha
        4
    """
    check_adapter_config(config, extra_state)
    layers = {name.removeprefix(_PREFIX): LoraFactors(*pair) for name, pair in factors.items()}
    if not layers:
        raise ValueError("there are no factors to write.")
    if isinstance(scaling, Mapping):
        scalings = {name.removeprefix(_PREFIX): float(value) for name, value in scaling.items()}
        if set(scalings) != set(layers):
            raise ValueError(
                f"scaling has the layers {sorted(scalings)[:3]}... and factors {sorted(layers)[:3]}...: give the same."
            )
    else:
        scalings = dict.fromkeys(layers, float(scaling))
    state: dict[str, Tensor] = dict(extra_state or {})
    ranks, left_out = {}, {}
    for name, pair in layers.items():
        check_factors(*pair, f"lora_A and lora_B of {name!r}")
        for factor, what in zip(pair, ("lora_A", "lora_B"), strict=True):
            check_finite(factor, f"{what} of {name!r}")
        pair, error = pair.truncated(rank) if rank is not None and rank < pair.rank else (pair, 0.0)
        ranks[name], left_out[name] = pair.rank, scalings[name] * error
        for what, factor in zip(("lora_A", "lora_B"), pair, strict=True):
            state[f"{_PREFIX}{name}.{what}.weight"] = (
                factor.detach().float().cpu().clone(memory_format=torch.contiguous_format)
            )
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _adapter_config(config, ranks, scalings).save_pretrained(folder)
    return left_out


def _adapter_config(config: LoraConfig, ranks: dict[str, int], scalings: dict[str, float]) -> LoraConfig:
    """Return a config under which every layer has its rank and scaling."""
    alphas = {name: _whole(scalings[name] * ranks[name]) for name in ranks}
    usual_rank = Counter(ranks.values()).most_common(1)[0][0]
    usual_alpha = Counter(alpha for name, alpha in alphas.items() if ranks[name] == usual_rank).most_common(1)[0][0]
    result = deepcopy(config)
    result.r, result.lora_alpha = usual_rank, usual_alpha
    # Whole module paths: PEFT matches them at the end of a name, so a shorter one could match several layers.
    result.rank_pattern = {name: rank for name, rank in ranks.items() if rank != usual_rank}
    result.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != usual_alpha}
    result.use_rslora, result.init_lora_weights, result.inference_mode = False, True, True
    for name in _INITIALISATIONS:
        if hasattr(result, name):
            setattr(result, name, None)
    result.loftq_config = {}
    return result


def _whole(alpha: float) -> int | float:
    """Return alpha as the whole number it is up to rounding, or as it is."""
    return round(alpha) if abs(alpha - round(alpha)) <= 1e-12 * alpha else alpha


def check_adapter_config(config: LoraConfig, extra_state: Mapping[str, Tensor] | None = None) -> None:
    """Raise ValueError for settings under which an adapter is more than factors and `extra_state`.

    Example:
        >>> from peft import LoraConfig
        >>> from hfnoise.privacy.hf_lora_export import check_adapter_config
        >>> check_adapter_config(LoraConfig(use_dora=True))
        Traceback (most recent call last):
        ...
        ValueError: cannot write a plain adapter with use_dora=True: DoRA has a magnitude per output, which...
    """
    for name, why in _REFUSED.items():
        if getattr(config, name, None):
            raise ValueError(f"cannot write a plain adapter with {name}={getattr(config, name)!r}: {why}.")
    if config.bias != "none":
        raise ValueError(f"cannot write a plain adapter with bias={config.bias!r}: biases are not among the factors.")
    for module in config.modules_to_save or ():
        if not any(module in name for name in extra_state or {}):
            raise ValueError(
                f"the config has modules_to_save={config.modules_to_save}, and extra_state no weight of {module!r}: "
                "loaded, it would be drawn at random. Give its weights, or take it out of the config."
            )
