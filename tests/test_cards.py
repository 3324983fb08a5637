"""What a card says of the run that a stranger could not guess: the base, the command, the folder."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy
import pytest
import torch
from huggingface_hub import ModelCard
from jinja2 import UndefinedError
from transformers.trainer_utils import IntervalStrategy

import hfnoise
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


def facts(**given):
    return cards.CardFacts(
        **{
            "name": "x", "lead": "A thing.", "method": "m", "base": cards.base_of(""), "noise": [("rate", "0.1")],
            "seeds": [("seed", "1")], "snippet": "import x", "library_name": "peft", "tags": ["b", "a", "b"],
        } | given
    )  # fmt: skip


@pytest.mark.parametrize(
    "lead",
    [
        "A fine-tuned version of None.", "A loss of nan.", "[More Information Needed]", "licence: license",
        "license: license", "By {{ name }}.", "{% if x %}", "TODO",
    ],
)  # fmt: skip
def test_a_card_that_does_not_know_something_is_refused(lead):
    with pytest.raises(ValueError, match="the card would say"):
        facts(lead=lead).render()


@pytest.mark.parametrize("lead", ['by "None"', "org/nan-model", "the model None-such", "banana"])
def test_names_of_others_are_left_alone(lead):
    assert lead in facts(lead=lead).render().text
    assert "--x None {{" in facts(command="run --x None {{").render().text
    assert "# TODO\n" in facts(name="TODO", snippet='load("runs/TODO")').render().text


def test_missing_variables_and_unknown_values_are_refused():
    with pytest.raises(UndefinedError, match="client_rows"):
        facts().render("federated.md", statement="Private.", not_covered=["all"])
    with pytest.raises(ValueError, match="None or not a number"):
        facts(noise=[("rate", None)]).render()
    with pytest.raises(ValueError, match="states its seeds"):
        facts(seeds=[]).render()
    with pytest.raises(TypeError, match="card_data"):
        cards.render_card("card.md", {}, name="x")


BLOCK = {
    "rate": 0.1, "small": 1e-05, "big": float("inf"), "count": 3, "on": True, "word": "1e-3", "no": "no",
    "nothing": None, "list": [1, 2.5, False, "a: b"], "nested": {"interval": [0.1, 0.3], "deeper": {"x": ["y"]}},
    "text": "a\nb #c",
}  # fmt: skip


def test_the_block_comes_back_as_it_was_given(tmp_path):
    others = {"tuple": (1, 2), "array": numpy.float64(0.25), "tensor": torch.tensor(3), "enum": IntervalStrategy.NO}
    facts(block=BLOCK | others, lead="A thing.").render().save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    expected = {**BLOCK, "tuple": [1, 2], "array": 0.25, "tensor": 3, "enum": "no"}
    assert loaded.data.to_dict()["hfnoise"] == {"method": "m", **expected, "version": hfnoise.__version__}
    assert loaded.data.tags == ["b", "a"]
    with pytest.raises(ValueError, match=r"hfnoise.a.b is not a number"):
        facts(block={"a": {"b": float("nan")}}).render()
    with pytest.raises(TypeError, match=r"hfnoise.a is a set"):
        facts(block={"a": {1}}).render()


def test_bars_and_line_ends_do_not_break_a_table():
    assert "| a\\|b | c d |" in facts(noise=[("a|b", "c\nd")]).render().text


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_base_has_a_revision_where_one_is_known(tmp_path, monkeypatch):
    from huggingface_hub import constants

    part = cards.base_of(f"/cache/models--me--model/snapshots/{COMMIT}/unet")
    assert (part.hub_id, part.commit) == ("me/model", COMMIT) and COMMIT in part.revision
    assert cards.base_of("me/model", COMMIT) == part
    assert cards.base_of(model_path()).revision == f"that of hfnoise {hfnoise.__version__}"
    local = cards.base_of(str(tmp_path))
    assert local.hub_id is None and "local folder" in local.revision and str(tmp_path) not in local.name
    assert cards.base_of("/gone/away").hub_id is None  # a folder that is no longer there
    assert "not known" in cards.base_of("me/never-loaded").revision
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--me--cached" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (tmp_path / "models--me--cached" / "refs").mkdir()
    (tmp_path / "models--me--cached" / "refs" / "main").write_text(COMMIT)
    cached = cards.base_of("me/cached")
    assert cached.commit == COMMIT and "the one in the cache" in cached.revision
    assert "in the cache" not in cards.base_of("me/cached", revision="main").revision + part.revision


def test_rates_have_an_interval_where_their_number_is_known():
    assert cards.rate("r", 1.0, 4, "pairs").spread == "0.510 to 1.000 (95 % interval, 4 pairs)"
    assert cards.rate("r", 0.5, None).spread == cards.ONE_RUN
    assert cards.rate("r", float("nan"), 4).value == "not a number"
    assert cards.number(float("-inf")) == "minus infinite"


def test_of_the_command_only_secrets_are_hidden(monkeypatch):
    token = "hf_" + "a" * 34
    shown = ["--eos_token", "<|end|>", "--pad-token=x", "--my-hub-token", "s", "--HF_TOKEN=s", f"env={token}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *shown])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    command = cards.command_line()
    assert "--eos_token '<|end|>' --pad-token=x" in command
    assert "--my-hub-token HIDDEN --HF_TOKEN=HIDDEN env=HIDDEN" in command
