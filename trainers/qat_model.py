"""The model of a quantisation-aware run: prepared from floats, or checked as it is; its bits; its teacher."""

from __future__ import annotations

import copy
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn

from hfnoise.quantization.hf_config import QuestConfig
from hfnoise.quantization.hf_export import master_layers, prepare_qat
from hfnoise.quantization.linear import LinearQuantization
from hfnoise.trainers.qat_config import QATArguments


def is_quantized(model: nn.Module) -> bool:
    """Return whether a model has layers of a [`~hfnoise.QuestConfig`].

    Example:
        >>> from torch import nn
        >>> from hfnoise.trainers.qat_model import is_quantized
        >>> is_quantized(nn.Linear(2, 2))
        False
    """
    return any(isinstance(getattr(module, "quantization", None), LinearQuantization) for module in model.modules())


def prepare_student(model: nn.Module, args: QATArguments, teacher_model: Any = None) -> Any:
    """Make `model` trainable at the bits that `args` ask for, in place; return its teacher, if it is to have one.

    Args:
        model (`torch.nn.Module`): float, or quantised already with master weights.
        args ([`QATArguments`]).
        teacher_model (`torch.nn.Module` or `str`, *optional*): by default a frozen copy of the float `model`.

    Raises:
        ValueError: if the weights are packed, the arguments contradict a model that is quantised already, or there is
            no full-precision model to distil from.
    """
    if teacher_model is not None and not args.distillation_weight:
        raise ValueError("teacher_model is given and distillation_weight is 0, so nothing would ask it. Set a weight.")
    _refuse_other_quantization(model)
    if is_quantized(model):
        _check_as_given(model, args)
        if args.distillation_weight and teacher_model is None:
            raise ValueError(
                f"distillation_weight is {args.distillation_weight} and the model is quantised already: there is no "
                "full-precision model to copy. Give it as teacher_model=."
            )
        return _frozen(model, teacher_model) if args.distillation_weight else None
    if is_peft_model(model):
        raise ValueError(
            "the model has adapters on float layers; quantising now would quantise the adapters too. Load it with a "
            "QuestConfig (or prepare_qat it) first, and add the adapters then."
        )
    teacher = None
    if args.distillation_weight:
        teacher = _frozen(model, copy.deepcopy(model) if teacher_model is None else teacher_model)
    prepare_qat(model, args.quest_config())
    return teacher


def _refuse_other_quantization(model: Any) -> None:
    """Raise ValueError for a model that somebody else has quantised: its weights are codes, and no master weights."""
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(model, "hf_quantizer", None) is None or stored is None or isinstance(stored, QuestConfig):
        return
    method = getattr(stored, "quant_method", type(stored).__name__)
    raise ValueError(
        f"the model was loaded quantised by {getattr(method, 'value', method)}, and quantisation-aware training "
        "starts from float weights, or from those of a QuestConfig. Load it without that quantization_config; to "
        "train adapters on such a base, use the Trainer without QAT."
    )


def _frozen(model: Any, teacher: Any) -> nn.Module:
    if isinstance(teacher, str):
        teacher = type(model).from_pretrained(teacher)
    if not isinstance(teacher, nn.Module):
        raise ValueError(f"teacher_model is a {type(teacher).__name__}; give a model, its name or its folder.")
    sizes = [getattr(getattr(one, "config", None), "vocab_size", None) for one in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the teacher has a vocabulary of {sizes[1]} and the model one of {sizes[0]}: their logits are not of the "
            "same tokens. Choose a teacher with the model's tokenizer."
        )
    return teacher.eval().requires_grad_(False)


def _check_as_given(model: nn.Module, args: QATArguments) -> None:
    """Raise a ValueError where arguments say something else than the quantised model does."""
    _, first = next(iter(_masters(model).values()))
    given = args.given_quantization()
    asked = args.quest_config()
    wanted: dict[str, Any] = {}
    if {"bits", "weight_bits"} & set(given) and args.bit_schedule is None:
        wanted = {"weight_bits": asked.weight_bits, "activation_bits": asked.activation_bits}
    wanted |= {name: given[name] for name in ("trust_factor", "estimator") if name in given}
    if "hadamard_group" in given:
        wanted["hadamard_group"] = asked.hadamard_group
    has = {name: getattr(first, name) for name in wanted}
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    if "modules_to_not_convert" in given and isinstance(stored, QuestConfig):
        wanted["modules_to_not_convert"] = given["modules_to_not_convert"]
        has["modules_to_not_convert"] = stored.modules_to_not_convert
    differing = [name for name in wanted if wanted[name] != has[name]]
    if differing:
        said = ", ".join(f"{name} {wanted[name]} (the model has {has[name]})" for name in differing)
        raise ValueError(
            f"the model is quantised already and the arguments contradict it: {said}. Leave them out to keep what the "
            "model has, or give the float model."
        )
    schedule = args.schedule_for(target_config(model, args))
    current = (first.weight_bits, first.activation_bits)
    if schedule is not None and current not in [phase[:2] for phase in schedule.phases]:
        raise ValueError(
            f"the model is quantised at {current[0]} bits (activations {current[1]}), which bit_schedule "
            f"{schedule.text!r} does not hold. Give the float model, or a schedule of this model's bits."
        )


def target_config(model: nn.Module, args: QATArguments) -> QuestConfig:
    """Return the configuration that the run ends with: that of the arguments, or of the model if they say no bits."""
    config = args.quest_config()
    given = args.given_quantization()
    if not {"bits", "weight_bits"} & set(given):
        _, first = next(iter(_masters(model).values()))
        config.weight_bits, config.activation_bits = first.weight_bits, first.activation_bits
    return config


def _masters(model: nn.Module) -> dict[str, tuple[Any, LinearQuantization]]:
    try:
        return master_layers(model)
    except ValueError as error:
        raise ValueError(
            f"{error} Packed weights hold codes and cannot be trained: load the master weights, or train adapters on "
            "the packed model with a stock Trainer."
        ) from error


def current_bits(model: nn.Module) -> tuple[float, float | None]:
    """Return the bits of weights and activations that a model computes with now.

    Example:
        >>> from torch import nn
        >>> from hfnoise import QuestConfig, prepare_qat
        >>> from hfnoise.trainers.qat_model import current_bits
        >>> current_bits(prepare_qat(nn.Sequential(nn.Linear(8, 8)), QuestConfig(weight_bits=2)))
        (2, None)
    """
    _, first = next(iter(master_layers(model).values()))
    return first.weight_bits, first.activation_bits


def set_bits(model: Any, weight_bits: float, activation_bits: float | None) -> None:
    """Quantise all quantised layers of a model at other bits from now on, and say so in its configuration.

    QuEST's scales are those of the weights, so nothing else has to be set. LSQ's learned steps are those of the old
    bits: they are forgotten, and set again from the next tensor.

    Example:
        >>> from torch import nn
        >>> from hfnoise import QuestConfig, prepare_qat
        >>> from hfnoise.trainers.qat_model import current_bits, set_bits
        >>> model = prepare_qat(nn.Sequential(nn.Linear(8, 8)), QuestConfig(bits=8))
        >>> set_bits(model, 1, 1)
        >>> current_bits(model)
        (1, 1)
    """
    for module, quantization in master_layers(model).values():
        module.quantization = quantization._replace(weight_bits=weight_bits, activation_bits=activation_bits)
        for name in ("weight_step", "activation_step"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                nn.init.zeros_(getattr(module, name))
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, QuestConfig):
        config.weight_bits, config.activation_bits = weight_bits, activation_bits
