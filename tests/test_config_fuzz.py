"""Any value for any field of any configuration: it is taken and comes back, or it is refused by name."""

import json
import logging
import math
import types
import typing
import warnings
from dataclasses import fields
from importlib import import_module

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CPU = {"output_dir": "unused", "use_cpu": True}
DPO = {**CPU, "bf16": False}
DATA = {"dataset_name": "hfnoise:docstrings"}
MODEL = {"model_name_or_path": "hfnoise:docstrings"}
# Where the class is -> what it needs to be made at all. Every configuration dataclass: a test compares.
CONFIGS = {
    "noise_dpo_config:NoiseDPOConfig": DPO,
    "robust_dpo:RobustDPOConfig": DPO,
    "dr_dpo:DrDPOConfig": DPO,
    "bvpo:BVPOConfig": DPO,
    "private_config:DPConfig": {"target_epsilon": 3},
    "federated_config:FedSVDConfig": {},
    "qat_config:QATArguments": {},
    "qat_config:QATTrainingArguments": CPU,
    "qat_sft:QATSFTConfig": DPO,
    "diffusion_arguments:DiffusionTrainingArguments": CPU,
    "one_more_step_arguments:OneMoreStepTrainingArguments": CPU,
    "noise_prompt_arguments:NoisePromptTrainingArguments": CPU,
    "golden_noise_arguments:GoldenNoiseScriptArguments": {"model_name_or_path": "digits", **DATA},
    "image_arguments:ImageScriptArguments": {},
    "image_arguments:OneMoreStepScriptArguments": {},
    "launch_arguments:PreferenceScriptArguments": DATA,
    "launch_federated:FederatedScriptArguments": DATA,
    "launch_qat:QATScriptArguments": DATA,
    "audit_arguments:AuditArguments": {**MODEL, **DATA},
    "score_pairs:ScoreArguments": {**MODEL, **DATA},
    "trace_pairs_run:TracePairsArguments": {**MODEL, **DATA, "reward": "arithmetic"},
    "generate_config:GenerateConfig": {"model_name_or_path": "digits", "prompt": ["a digit"]},
}
# The first is named by the field that it belongs to, the second by transformers.
SAID_BY = {"loss_weighting_kwargs": "loss_weighting", "lr_scheduler_type": "SchedulerType"}

PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.sampled_from(
        [math.nan, math.inf, -math.inf, -1, 0, 1e308, 10**400, "nan", "inf", "1e-3", "3", "auto", "none", "\0"]
    ),
)  # fmt: skip
ANYTHING = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=3),
    st.dictionaries(st.text(max_size=4), PLAIN, max_size=2),
    st.tuples(PLAIN),
    st.builds(object),
    st.just(complex(1, 2)),
)


def config_class(place):
    file, name = place.split(":")
    folder = "pipelines" if name == "GenerateConfig" else "trainers"
    return getattr(import_module(f"hfnoise.{folder}.{file}"), name)


def own_fields(cls):
    """Return the fields that are declared in hfnoise, without those of the stock class that we leave to it."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("hfnoise")]
    names = {name for base in bases for name in vars(base).get("__annotations__", ())}
    return sorted(names & {field.name for field in fields(cls)})


def is_of(value, wanted):
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, one) for one in arguments)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(is_of(one, arguments[0]) for one in value)
    return wanted is typing.Any or isinstance(value, origin or wanted)


def check_any_value(cls, needed, data):
    name, value = data.draw(st.sampled_from(own_fields(cls))), data.draw(ANYTHING)
    try:
        made = cls(**{**needed, name: value})
    except (ValueError, TypeError) as error:
        assert name in str(error) or SAID_BY.get(name, name) in str(error), f"{name}={value!r}: {error}"
        assert len(str(error)) < 2000
        return
    taken = getattr(made, name)
    assert is_of(taken, typing.get_type_hints(cls)[name]), f"{name}={value!r} became {taken!r}"
    ours = {field: getattr(made, field) for field in own_fields(cls)}
    again = cls(**{**needed, **json.loads(json.dumps(ours, allow_nan=False, default=str))})
    assert {field: getattr(again, field) for field in ours} == ours


def fuzz(examples, cls, needed):
    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def run(data):
        check_any_value(cls, needed, data)

    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("place", CONFIGS)
def test_any_value_is_taken_or_refused_by_name(place):
    fuzz(10, config_class(place), CONFIGS[place])


@pytest.mark.soak
@pytest.mark.parametrize("place", CONFIGS)
def test_any_value_is_taken_or_refused_by_name_at_length(place):
    fuzz(400, config_class(place), CONFIGS[place])
