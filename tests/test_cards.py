"""What a card says of the run that a stranger could not guess: the base, the command, the folder."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from hfnoise import cards
from hfnoise.worlds.docstrings import model_path


@pytest.mark.parametrize(
    ("module", "argv", "command"),
    [
        (
            "hfnoise.__main__",
            ["/usr/lib/hfnoise/__main__.py", "demo", "--seed", "1"],
            "python -m hfnoise demo --seed 1",
        ),
        ("hfnoise.worlds.digits", ["/usr/lib/digits.py", "--seed", "1"], "python -m hfnoise.worlds.digits --seed 1"),
        (None, ["/usr/bin/hfnoise", "demo", "--output_dir", "my run"], "hfnoise demo --output_dir 'my run'"),
        (None, ["examples/train.py", "--beta=1"], "python examples/train.py --beta=1"),
        (None, ["/home/me/train.py"], "python train.py"),
        (None, ["-c"], "python  # code that was typed in, or a notebook: there was no command line"),
    ],
)
def test_the_command_can_be_typed_again(monkeypatch, module, argv, command):
    main = ModuleType("__main__")
    main.__spec__ = module and ModuleSpec(module, None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", argv)
    assert cards.command_line() == command


def test_an_embedded_model_is_named(tiny_model_path):
    assert cards.embedded_name(model_path()) == "`hfnoise:docstrings` (0.77 M parameters, part of hfnoise)"
    assert cards.embedded_name(tiny_model_path) is None
    assert cards.embedded_name("someone/docstrings-llama") is None
