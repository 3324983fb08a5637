"""How docstrings become pages: sections as tables, references and papers as links.

The docstrings are in the form of Hugging Face's doc-builder, name (`type`): text, in sections of Google's style.
Parsers of the one or the other style misread parts of it (several arguments in one entry, types with commas), so the
sections are turned into Markdown here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import cleandoc
from typing import Any

import griffe

from hfnoise.methods import public_names

# [`Name`], [`~trl.DPOTrainer`]: doc-builder's references. Not [`Name`](address) and [`Name`][identifier].
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
_PAPER = re.compile(r"(?<!\[)\barXiv[: ](\d{4}\.\d{5})")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples):$")
_TITLES = {"Args": "Arguments", "Examples": "Example"}
_ENTRY = re.compile(r"^(\*{0,2}\w+)(?: \((.*)\))?$", re.S)


def linked(text: str) -> str:
    """Return text in which references to public names and numbers of papers are links.

    Args:
        text (`str`): a docstring. Names that are not on a page of the reference stay code.
    """
    modules = public_names()

    def reference(match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2]
        ours = name in modules and match[1] in (name, f"hfnoise.{name}", f"{modules[name]}.{name}")
        return f"[`{name}`][{modules[name]}.{name}]" if ours else f"`{name}`"

    return _PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", _REFERENCE.sub(reference, text))


def sections(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield the parts of a docstring: the title of a section, "" for prose, and its text without indentation."""
    title, lines = "", []
    for line in cleandoc(docstring).splitlines():
        match = _SECTION.match(line)
        if match or (title and line and not line.startswith(" ")):
            yield title, cleandoc("\n".join(["", *lines])).strip()
            title, lines = (match[1], []) if match else ("", [line])
        else:
            lines.append(line)
    yield title, cleandoc("\n".join(["", *lines])).strip()


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Yield head and meaning of the entries of a section; the head is "" where an entry has none."""
    for entry in re.split(r"\n(?=\S)", text):
        words = " ".join(entry.split())
        depth, in_code = 0, False
        for place, sign in enumerate(words):
            in_code ^= sign == "`"
            depth += 0 if in_code else (sign in "([") - (sign in ")]")
            if sign == ":" and not depth and not in_code and words[place + 1 : place + 2] == " ":
                yield words[:place], words[place + 2 :]
                break
        else:
            yield "", words


def argument_table(text: str) -> str:
    """Return the table of a section of arguments."""
    rows = ["| argument | meaning |", "| --- | --- |"]
    for head, meaning in entries(text):
        match = _ENTRY.match(head)
        name = f"`{match[1]}`" if match else head
        kind = f'<br><span class="argument-type">{match[2]}</span>' if match and match[2] else ""
        rows.append(f"| {name}{kind} | {meaning} |".replace("\\|", "|"))
    return "\n".join(rows)


def example(text: str) -> str:
    """Return an example with its interpreter sessions highlighted."""
    parts = []
    for part in re.split(r"\n\n+", text):
        parts.append(f"```pycon\n{part}\n```" if part.startswith(">>>") else part)
    return "\n\n".join(parts)


def as_markdown(docstring: str) -> str:
    """Return a docstring as the Markdown of its place in the reference."""
    parts = []
    for title, text in sections(docstring):
        heading = f'<p class="section-title">{_TITLES.get(title, title)}</p>\n\n' if title else ""
        if title in ("Args", "Attributes"):
            parts.append(heading + argument_table(linked(text)))
        elif title == "Raises":
            rows = [f"- `{head}`: {meaning}" if head else f"- {meaning}" for head, meaning in entries(linked(text))]
            parts.append(heading + "\n".join(rows))
        elif title in ("Example", "Examples"):
            parts.append(heading + example(text))
        else:
            parts.append(heading + linked(text))
    return "\n\n".join(part for part in parts if part)


class HuggingFaceDocstrings(griffe.Extension):
    """Hands every docstring on as Markdown, and the defaults of options without their helper."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "option_field":
            attr.value = value.arguments[1]

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
