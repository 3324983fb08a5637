"""Any value for any argument of a guider or an initial noise: taken, or refused by name."""

import inspect
import logging
import math
import warnings

import pytest
import torch

import hfnoise
import hfnoise.pipelines
from hfnoise.latents import ResidualStatistics

SEARCH = {"verifier": lambda images, prompts: torch.zeros(len(images)), "budget": 40}
# What each needs; every guider and initial noise that is made from options.
CONSTRUCTORS = {
    "AdaptiveGuidance": {}, "ProjectedGuidance": {}, "LinearGuidance": {}, "ReDenoise": {}, "NoiseLevelGuidance": {},
    "RandomSearch": SEARCH, "ZeroOrderSearch": SEARCH, "PathSearch": SEARCH, "SeedVariation": {"strength": 0.1},
    "BrightnessOffset": {"value": 0.5}, "ConditioningNoise": {"strength": 0.1},
    "TerminalPrior": {"statistics": ResidualStatistics([0.0], [[1.0]])},
    "OneMoreStep": {"module": torch.nn.Identity()},
}  # fmt: skip
ODD = [
    None, math.nan, math.inf, -math.inf, -1, 0, 1e308, 10**400, True, False, "", "x", "nan", "1e-3", "3", 3, 0.5, [],
    [1], ["a"], [None], {}, {"a": 1}, b"x", object(), (1, 2), 1 + 2j, [math.nan], torch.tensor(math.nan),
]  # fmt: skip
# Texts of any kind are prompts.
TEXTS = {"prompt", "negative_prompt", "prompts"}


def is_poison(value):
    """Return whether a value is right for no argument but a text."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(one, float) and math.isnan(one) for one in entries):
        return True
    return isinstance(value, (str, bytes, complex)) or type(value) is object or value == [None] or value == ["a"]


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_any_argument_is_taken_or_refused_by_name(name):
    cls = getattr(hfnoise, name, None) or getattr(hfnoise.pipelines, name)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for argument in list(inspect.signature(cls.__init__).parameters)[1:]:
                for value in ODD:
                    try:
                        cls(**{**CONSTRUCTORS[name], argument: value})
                    except (ValueError, TypeError) as error:
                        assert argument in str(error), f"{argument}={value!r:.40}: {error}"
                    else:
                        assert argument in TEXTS or not is_poison(value), f"{argument}={value!r:.40} was taken"
    finally:
        logging.disable(logging.NOTSET)
