"""The contract of the table in `hfnoise.methods`: what a row says is there, and says the same everywhere."""

import dataclasses
import inspect
import re
from collections import Counter
from importlib import import_module

import pytest

import hfnoise
from hfnoise.commands import COMMANDS, CONVERSIONS
from hfnoise.methods import METHODS, SHARED_EXPORTS, find_method, public_names

READY = [method for method in METHODS if method.state == "ready"]
FAMILIES = {"preference", "privacy", "quantization", "guidance", "latents"}

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
each_ready_method = pytest.mark.parametrize("method", READY, ids=lambda method: method.name)


def resolve(entry):
    """Return what `module:function` names."""
    module, _, name = entry.partition(":")
    return getattr(import_module(module), name)


@each_method
def test_row_is_complete(method):
    assert method.family in FAMILIES
    assert method.state in ("ready", "planned")
    assert method.title and method.stock and "hfnoise" in method.tags
    # What users write is a Trainer or a guider, as the family says, and never both.
    assert bool(method.guider) == (method.family == "guidance") and bool(method.trainer) != bool(method.guider)
    # Methods that differ in the Trainer only share a configuration.
    assert method.main_class in method.exports and method.config in public_names()


@each_method
def test_paper_can_be_found_and_cited(method):
    assert re.fullmatch(r"\d{4}\.\d{4,5}", method.paper)
    assert re.match(r"@\w+\{\w+,", method.bibtex) and method.bibtex.rstrip().endswith("}")
    assert "title" in method.bibtex and "author" in method.bibtex and method.paper in method.bibtex


@each_method
def test_options_are_described(method):
    assert len({option.name for option in method.options}) == len(method.options)
    for option in method.options:
        assert option.name.isidentifier() and option.type and option.help.endswith("."), option.name
        # argparse formats the help with %.
        assert "%" not in option.help.replace("%%", ""), option.name


@each_ready_method
def test_options_are_fields_of_the_configuration(method):
    fields = {field.name: field for field in dataclasses.fields(getattr(hfnoise, method.config))}
    for option in method.options:
        field = fields[option.name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert default == option.default, option.name
        assert field.metadata["help"] == option.help, option.name


@pytest.mark.parametrize("method", [method for method in READY if method.guider], ids=lambda method: method.name)
def test_options_of_a_guider_are_its_own(method):
    guider = getattr(hfnoise, method.guider)
    parameters = inspect.signature(guider.__init__).parameters
    for option in method.options:
        assert parameters[option.name].default == option.default, option.name
    # The sub-command makes that guider.
    config = getattr(hfnoise, method.config)("digits", prompt=["seven"], guider=method.name.removesuffix("-guidance"))
    assert type(config.make_guider()) is guider


@pytest.mark.parametrize("row", [*READY, *COMMANDS, *CONVERSIONS], ids=lambda row: row.name)
def test_launch_is_a_function(row):
    assert callable(resolve(row.launch))


@pytest.mark.parametrize("name", public_names())
def test_public_name(name):
    value = getattr(hfnoise, name)
    assert value is getattr(import_module(public_names()[name]), name)
    assert value.__doc__, "a public name needs a docstring"
    assert name in dir(hfnoise)


def test_names_are_unique():
    commands = ["list", *(method.name for method in METHODS), *(command.name for command in COMMANDS)]
    exports = [*SHARED_EXPORTS, *(name for method in METHODS for name in method.exports)]
    assert {name: count for name, count in Counter(commands + exports).items() if count > 1} == {}


def test_unknown_names_say_what_is_known():
    with pytest.raises(ValueError, match="unknown method 'robust'; known are .*robust-dpo"):
        find_method("robust")
    with pytest.raises(AttributeError, match="'hfnoise' has no attribute 'RobustTrainer'"):
        _ = hfnoise.RobustTrainer
    with pytest.raises(AttributeError, match="'AdaptiveGuidence'; did you mean AdaptiveGuidance"):
        _ = hfnoise.AdaptiveGuidence
    with pytest.raises(AttributeError, match="`hfnoise list` shows"):
        _ = hfnoise.zzz
