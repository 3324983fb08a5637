"""What the site has beside docs/: the start page, changelog, API reference, lists of results, and linked sources.

A hook of mkdocs. Nothing is written into docs/: the pages exist in the build only.
"""

from __future__ import annotations

import ast
import atexit
import os
import posixpath
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

from hfnoise.methods import METHODS, public_names

ROOT = Path(__file__).resolve().parent.parent.parent
# Files of the repository that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/space/README.md": "space.md",
}
# What setup.py maps into the package.
MAPPED_PARTS = ("trainers", "pipelines", "model_cards", "benchmarks")
# Page of the reference, its title, and the modules whose names it holds: the first page with a fitting prefix.
REFERENCE = {
    "preference": (
        "Preference",
        "hfnoise.preference",
        *(
            f"hfnoise.trainers.{name}"
            for name in ("noise_dpo", "robust_dpo", "dr_dpo", "bvpo", "score_pairs", "trace_")
        ),
    ),
    "privacy": ("Privacy", "hfnoise.privacy", "hfnoise.trainers.private", "hfnoise.trainers.federated"),
    "quantization": ("Quantisation", "hfnoise.quantization", "hfnoise.trainers.qat"),
    "guidance": (
        "Guidance",
        *(f"hfnoise.pipelines.{name}" for name in ("adaptive_", "projected_", "guid", "auto_guided", "generate_")),
    ),
    "diffusion_training": (
        "Training diffusion models",
        "hfnoise.latents.loss_weighting",
        *(f"hfnoise.trainers.{name}" for name in ("diffusion", "one_more_step", "noise_prompt")),
    ),
    "initial_noise": ("Initial noise", "hfnoise.latents", "hfnoise.pipelines", "hfnoise.worlds"),
}
CORE = ("preference", "privacy", "quantization", "guidance", "latents")
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".cpp": "cpp", ".md": "markdown"}
_linked_sources: dict[str, str] = {}


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> Any:
    """Give the reference a tree that is laid out as the installed package is: griffe reads it without importing."""
    tree = Path(tempfile.mkdtemp(prefix="hfnoise-docs-")) / "hfnoise"
    atexit.register(shutil.rmtree, tree.parent, ignore_errors=True)
    # Copies: griffe does not follow links between folders.
    shutil.copytree(ROOT / "hfnoise", tree, ignore=all_but_python)
    for part in MAPPED_PARTS:
        shutil.copytree(ROOT / part, tree / part, ignore=all_but_python)
    handler = config.plugins["mkdocstrings"].config.handlers["python"]
    handler["paths"] = [str(tree.parent)]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, content in reference_pages().items():
        files.append(File.generated(config, f"api/{page}.md", content=content))
    files.append(File.generated(config, "results/index.md", content=results_page()))
    _linked_sources.clear()
    for file in list(files.documentation_pages()):
        folder = posixpath.dirname(repository_path(file.src_uri))
        for _, target in _LINK.findall(without_code(file.content_string)):
            add_source(target, folder)
    for path, content in _linked_sources.items():
        files.append(File.generated(config, source_page(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Point links into the repository to the pages of the site."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    folder = posixpath.dirname(repository_path(here))

    def relink(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        address, hash_sign, anchor = target.partition("#")
        if not address or re.match(r"\w+:", address):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, address))
        if path in PAGES:
            found = PAGES[path]
        elif path == "docs/results":
            found = "results/index.md"
        elif path.startswith("docs/"):
            found = path.removeprefix("docs/")
        elif path in _linked_sources:
            found = source_page(path)
        else:
            return match[0]  # mkdocs warns
        return f"{text}({posixpath.relpath(found, posixpath.dirname(here) or '.')}{hash_sign}{anchor})"

    parts = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.M | re.S)
    return "".join(part if index % 2 else _LINK.sub(relink, part) for index, part in enumerate(parts))


def all_but_python(folder: str, names: list[str]) -> list[str]:
    """Return what is not copied: all files but Python's. In the form that `shutil.copytree` asks for."""
    return [name for name in names if not name.endswith(".py") and not (Path(folder) / name).is_dir()]


def without_code(markdown: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.M | re.S)


def repository_path(page: str) -> str:
    """Return where in the repository the text of a page of the site stands."""
    return {generated: source for source, generated in PAGES.items()}.get(page, f"docs/{page}")


def source_page(path: str) -> str:
    """Return the page that shows a file or a folder of the repository."""
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def add_source(target: str, folder: str) -> None:
    """Keep a page for what a link names, if that lies in the repository and outside of docs/."""
    address = target.partition("#")[0]
    if not address or re.match(r"\w+:", address):
        return
    path = posixpath.normpath(posixpath.join(folder, address))
    if path in PAGES or path.startswith(("docs/", "..")) or path in _linked_sources or not (ROOT / path).exists():
        return
    if (ROOT / path).is_file():
        text = (ROOT / path).read_text(encoding="utf-8")
        _linked_sources[path] = f"# {path}\n\n`````{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n`````\n"
        return
    inside = sorted(p for p in (ROOT / path).iterdir() if p.suffix in _LANGUAGES and p.is_file())
    _linked_sources[path] = ""
    for child in inside:
        add_source(posixpath.relpath(f"{path}/{child.name}", folder or "."), folder)
    rows = [f"- [{child.name}]({os.path.basename(child)}.md)" for child in inside]
    _linked_sources[path] = f"# {path}\n\n" + "\n".join(rows) + "\n"


def results_page() -> str:
    """Return the list of raw results."""
    folder = ROOT / "docs" / "results"
    names = sorted({path.stem for path in folder.iterdir()})
    lines = [
        "# Raw results",
        "",
        "What the benchmarks wrote: tables, numbers with machine and versions, and plots.",
        "",
    ]
    lines += ["| benchmark | files |", "| --- | --- |"]
    for name in names:
        kinds = [path for path in sorted(folder.glob(f"{name}.*")) if path.stem == name]
        lines.append(f"| {name} | " + " · ".join(f"[{path.suffix[1:]}]({path.name})" for path in kinds) + " |")
    return "\n".join(lines) + "\n"


def reference_pages() -> dict[str, str]:
    """Return the pages of the API reference by name; every public name is on one of them.

    Raises:
        PluginError: if a public name fits on no page.
    """
    names = public_names()
    pages: dict[str, list[str]] = {page: [] for page in REFERENCE}
    for name in sorted(names, key=str.lower):
        where = defining_module(names[name], name)
        fitting = [page for page, (_, *prefixes) in REFERENCE.items() if where.startswith(tuple(prefixes))]
        if not fitting:
            raise PluginError(f"{name} of {names[name]} is on no page of the reference; add it to docs/site/pages.py")
        pages[fitting[0]].append(name)
    contents = {}
    for page, (title, *_) in REFERENCE.items():
        entries = "\n\n".join(f"::: {names[name]}.{name}" for name in pages[page])
        contents[page] = (
            f"# {title}\n\nEvery name is imported from `hfnoise`: `from hfnoise import ...`.\n\n{entries}\n"
        )
    index = ["# API reference", "", "By the families, and the [core arithmetic](core.md) beneath them.", ""]
    for page, (title, *_) in REFERENCE.items():
        index += [f"**[{title}]({page}.md)**: ", ", ".join(f"[`{n}`][{names[n]}.{n}]" for n in pages[page]), ""]
    index += ["| method | Trainer, guider or pipeline |", "| --- | --- |"]
    for method in METHODS:
        index.append(f"| `{method.name}` | [`{method.main_class}`][{names[method.main_class]}.{method.main_class}] |")
    contents["index"] = "\n".join(index) + "\n"
    contents["core"] = core_page(set(names))
    return contents


def core_page(elsewhere: set[str]) -> str:
    """Return the page of what the core packages export and `hfnoise` itself does not."""
    lines = ["# Core arithmetic", "", "What the families are built on: torch and the standard library only.", ""]
    for package in CORE:
        module = ROOT / "hfnoise" / package / "__init__.py"
        lines += [f"## hfnoise.{package}", ""]
        exports = package_exports(module)
        for name, where in sorted(exports.items(), key=lambda pair: pair[0].lower()):
            if name not in elsewhere and not name.isupper():
                lines += [f"::: {where}.{name}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines)


def package_exports(init: Path) -> dict[str, str]:
    """Return the names that a core package exports and the module of each, read off its `__init__.py`."""
    package = f"hfnoise.{init.parent.name}"
    exports: dict[str, str] = {}
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            exports |= {alias.name: str(node.module) for alias in node.names if not alias.name.startswith("_")}
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_MODULES":
            exports |= {name: f"{package}.{part}" for name, part in ast.literal_eval(node.value).items()}
    return exports


def defining_module(module: str, name: str) -> str:
    """Return where a name of a core package is defined; other modules are returned as they are."""
    init = ROOT / module.replace(".", "/") / "__init__.py"
    return package_exports(init).get(name, module) if init.is_file() else module
