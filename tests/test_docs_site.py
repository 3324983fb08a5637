"""The site builds without a warning and without the network; what the pages quote is what the code says."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hfnoise.methods import public_names

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MOVING = sorted((DOCS / "from_official").glob("*.md"))

needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings_handlers")),
    reason="mkdocs-material and mkdocstrings-python are not installed: pip install 'hfnoise[docs]'",
)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Return the folder of the site, built strictly, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml", "-d", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@needs_mkdocs
@pytest.mark.slow
def test_the_site_is_whole_and_needs_no_network(site):
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert {"index.html", "cookbook.html", "troubleshooting.html", "api/index.html"} <= set(pages)
    for page, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link[^>]* rel=\"?(?:stylesheet|preload|preconnect)[^>]*href=\"?([^\" >]+)", text)
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page
    # Every public name has its entry, and references became links.
    reference = "".join(text for page, text in pages.items() if page.startswith("api/"))
    missing = [name for name, module in public_names().items() if f'id="{module}.{name}"' not in reference]
    assert not missing
    assert "[`" not in re.sub(r"<(pre|code)\b.*?</\1>", "", reference, flags=re.S)


def test_every_page_is_in_the_navigation():
    navigation = (DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = [path for path in DOCS.rglob("*.md") if "results" not in path.parts and "site" not in path.parts]
    assert pages and not [path for path in pages if f" {path.relative_to(DOCS).as_posix()}\n" not in navigation]


def test_the_site_needs_no_empty_folder():
    # Git keeps none: what builds here would not build in a clone.
    folders = [path for path in (DOCS / "site").rglob("*") if path.is_dir()]
    assert folders and not [path for path in folders if not any(child.is_file() for child in path.rglob("*"))]


def messages():
    """Return the strings of the package, with {} for what varies."""
    found = []
    for part in ("hfnoise", "trainers", "pipelines"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_quoted_messages_are_those_of_the_code():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| \*\*(.+?)\*\* \|", page, re.M)
    said = messages()
    pieces = {piece.strip() for text in quoted for piece in text.split("...")}
    assert len(quoted) > 15 and not [piece for piece in pieces if piece and piece not in said]


@pytest.mark.parametrize(
    "page",
    # Those that draw pictures are slow.
    [pytest.param(p, marks=[pytest.mark.slow] * ("_pipeline()" in p.read_text("utf-8"))) for p in MOVING],
    ids=lambda path: path.stem,
)
def test_moving_from_an_official_repository(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == (page.stem != "index") and text.count("\n") <= 60
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})
