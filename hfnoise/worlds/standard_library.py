"""Read docstrings and functions of the installed Python standard library: its sources are parsed, never imported."""

from __future__ import annotations

import ast
import os
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# Tests, generated tables, and what is not part of the library proper.
_SKIPPED = frozenset("test tests idle_test idlelib lib2to3 turtledemo ensurepip pydoc_data __phello__".split())
_Definition = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Document:
    """One docstring, or the code of one function.

    Args:
        name (`str`): qualified name of the module, class or function, such as `json.decoder.JSONDecoder.decode`.
        text (`str`): its docstring, or its code without the docstring; without the indentation of the source.
        module (`str`, defaults to `""`): module it stands in; known for functions.
    """

    name: str
    text: str
    module: str = ""


@lru_cache(maxsize=1)
def standard_library_documents() -> tuple[Document, ...]:
    """Return all docstrings in the order of the sorted source files; of equal texts only the first.

    Returns:
        Documents with non-empty texts, 1 to 2 MB in all, kept in memory after the first call (a few seconds).

    Raises:
        RuntimeError: if this Python comes without the sources of its standard library.

    Example:
        >>> from hfnoise.worlds.standard_library import standard_library_documents
        >>> any(document.name == "json.dumps" for document in standard_library_documents())
        True
    """
    return _documents(lambda source, module: _docstrings(ast.parse(source), module))


@lru_cache(maxsize=1)
def standard_library_functions() -> tuple[Document, ...]:
    """Return the code of all functions and methods, without their docstrings, in the order of the sorted source files.

    Returns:
        Documents with non-empty texts, of equal texts only the first, kept in memory after the first call.

    Raises:
        RuntimeError: if this Python comes without the sources of its standard library.

    Example:
        >>> from hfnoise.worlds.standard_library import standard_library_functions
        >>> functions = {document.name: document.text for document in standard_library_functions()}
        >>> functions["bisect.insort_right"].splitlines()[0]
        'if key is None:'
    """
    return _documents(lambda source, module: _functions(ast.parse(source), source.decode().splitlines(), module))


def _documents(read: Callable[[bytes, str], Iterator[Document]]) -> tuple[Document, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Document] = {}
    for path, module in _modules(root):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources are not our business
            try:
                documents = list(read(path.read_bytes(), module))
            except (SyntaxError, ValueError):  # samples of bad source, or not in UTF-8
                continue
        for document in documents:
            found.setdefault(" ".join(document.text.split()), document)
    if not found:
        raise RuntimeError(
            f"no docstrings in {root}: this Python comes without the sources of its standard library. "
            "Use a Python that has them (python.org, conda, pyenv, or the full package of your distribution)."
        )
    return tuple(found.values())


def _modules(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield source file and dotted name of every module, sorted; names that cannot be imported are skipped."""
    for folder, subfolders, names in os.walk(root):
        # Pruning here also keeps the walk out of site-packages, whose name is no identifier.
        subfolders[:] = sorted(name for name in subfolders if name.isidentifier() and name not in _SKIPPED)
        package = Path(folder).relative_to(root).parts
        for stem in sorted(name[:-3] for name in names if name.endswith(".py") and name[:-3].isidentifier()):
            yield Path(folder, f"{stem}.py"), ".".join(package if stem == "__init__" else (*package, stem))


def _docstrings(node: ast.AST, name: str) -> Iterator[Document]:
    """Yield the docstring of a node and those of all definitions below it, also inside `if` and `try`."""
    if isinstance(node, (ast.Module, *_Definition)):
        text = (ast.get_docstring(node) or "").strip()
        if text:
            yield Document(name, text)
    for block in ("body", "orelse", "handlers", "finalbody"):
        children = getattr(node, block, ())
        for child in children if isinstance(children, list) else ():
            yield from _docstrings(child, f"{name}.{child.name}" if isinstance(child, _Definition) else name)


def _functions(node: ast.AST, lines: list[str], module: str, name: str = "") -> Iterator[Document]:
    """Yield the code of the functions and methods below a node; functions inside of functions belong to these."""
    for child in getattr(node, "body", ()):
        if not isinstance(child, _Definition):
            continue
        inner = f"{name or module}.{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, lines, module, inner)
            continue
        body = child.body[1:] if ast.get_docstring(child) else child.body
        if body:
            text = textwrap.dedent("\n".join(lines[body[0].lineno - 1 : child.end_lineno])).strip()
            yield Document(inner, text, module)
