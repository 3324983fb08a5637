"""Strict rendering: what a card does not know it must not print."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from enum import Enum
from importlib.resources import files
from typing import Any

from huggingface_hub import CardData, ModelCard
from jinja2 import Environment, FunctionLoader, StrictUndefined

# What is left where a value was missing, with what it is called in the message. A word in quotes, or one that is part
# of a longer name, is somebody's text.
_WORD = r"(?<![\w./\"'-]){}(?![\w/\"'-])"
_FORBIDDEN = {
    _WORD.format("None"): "a value that is missing",
    _WORD.format("nan"): "a figure that is not a number",
    r"More Information Needed|TODO": "a blank of a stock card",
    r"licen[cs]e: licen[cs]e": "TRL's placeholder of a license",
    r"\{\{|\{%|%\}": "a template that was not filled in",
}
# A citation has braces of its own.
_CITATION = re.compile(r"^```bibtex\n.*?^```$", re.MULTILINE | re.DOTALL)
_BLANK_LINES = re.compile(r"\n{3,}")


def render_card(
    template: str, card_data: CardData, verbatim: Sequence[str] = (), card_class: type = ModelCard, **values: Any
) -> Any:
    """Return a card rendered from a template of `hfnoise.model_cards`.

    Nothing is left blank: a variable that is missing or `None`, a text of [`check_card_text`], or a block `hfnoise:`
    that the YAML does not give back as it is, is an error.

    Args:
        template (`str`): file name below `model_cards/templates`.
        card_data (`huggingface_hub.CardData`): the YAML block.
        verbatim (sequence of `str`, *optional*): texts of others that are in the card, such as the command, which may
            hold anything.
        card_class (`type`, defaults to `ModelCard`): `DatasetCard` for a dataset.
        **values: every variable of the template.

    Returns:
        `ModelCard`, or `card_class`: the card, to `save`.

    Raises:
        jinja2.UndefinedError: if a variable is missing.
        ValueError: if something was not known.

    Example:
        >>> from huggingface_hub import ModelCardData
        >>> from hfnoise.cards import render_card
        >>> render_card("card.md", ModelCardData(), name="x")
        Traceback (most recent call last):
        ...
        jinja2.exceptions.UndefinedError: 'lead' is undefined
    """
    if not isinstance(card_data, CardData):
        raise TypeError(f"card_data must be a CardData of huggingface_hub, got {type(card_data).__name__}.")
    environment = Environment(
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_template),
        finalize=_refuse_unknown,
    )
    environment.filters["cell"] = _cell
    text = environment.get_template(template).render(card_data=card_data.to_yaml(), **values)
    text = _BLANK_LINES.sub("\n\n", text).rstrip("\n") + "\n"
    check_card_text(text, verbatim)
    card = card_class(text, ignore_metadata_errors=False)
    given, read = (one.to_dict().get("hfnoise") for one in (card_data, card.data))
    if given != read:
        raise ValueError(
            f"the block hfnoise: of the card does not come back from YAML as it was given: {given!r} became {read!r}. "
            "Give it numbers, strings, booleans, and lists and dicts of them."
        )
    return card


def check_card_text(text: str, verbatim: Sequence[str] = ()) -> None:
    """Raise ValueError if a card shows that something was not known when it was written.

    Args:
        text (`str`): a card, with its YAML block; its citation is not looked at.
        verbatim (sequence of `str`, *optional*): texts in it that are not looked at.

    Example:
        >>> from hfnoise.cards import check_card_text
        >>> check_card_text("fine-tuned version of None")
        Traceback (most recent call last):
        ...
        ValueError: the card would say 'fine-tuned version of None': a value that is missing.
    """
    for own in verbatim:
        text = text.replace(own, "") if own else text
    text = _CITATION.sub("", text)
    for pattern, meaning in _FORBIDDEN.items():
        found = re.search(rf".*?(?:{pattern}).*", text)
        if found:
            raise ValueError(f"the card would say {found.group().strip()!r}: {meaning}.")


def plain(value: Any, where: str = "hfnoise") -> Any:
    """Return a value as YAML can hold it: tuples as lists, numbers of other libraries as Python's.

    Raises:
        ValueError: for a number that is not one.
        TypeError: for what is neither a number, a string, a boolean, nor a list or dict of them.

    Example:
        >>> from hfnoise.cards.rendering import plain
        >>> plain({"interval": (0.1, 0.3)})
        {'interval': [0.1, 0.3]}
    """
    if isinstance(value, dict):
        return {str(name): plain(one, f"{where}.{name}") for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one, where) for one in value]
    value = value.value if isinstance(value, Enum) else value
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{where} is not a number. Leave it out of the card's block.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}; the card's block takes numbers, strings, lists and dicts.")


def _template(name: str) -> str:
    return (files("hfnoise.model_cards") / "templates" / name).read_text(encoding="utf-8")


def _refuse_unknown(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("a variable of the card's template is None or not a number: say in words what is not known.")
    return value


def _cell(value: Any) -> str:
    """Return a value as one cell of a Markdown table: a line, whose bars divide nothing."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(_refuse_unknown(value)).split()))
