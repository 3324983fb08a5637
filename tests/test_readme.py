"""README and docs say what the code says: the table of methods, and every Python block of the paper index runs."""

import re
from pathlib import Path

import pytest

from hfnoise.methods import METHODS

ROOT = Path(__file__).parent.parent


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


PYTHON_BLOCKS = [
    block
    for page in ("papers", "preference", "dr_dpo", "reasoning_traces")
    for block in python_blocks(f"docs/{page}.md")
]


def test_table_of_methods():
    rows = [
        f"| `{method.name}` | `{method.trainer}` | {method.stock} "
        f"| [{method.paper}](https://arxiv.org/abs/{method.paper}) | {method.state} |"
        for method in METHODS
    ]
    assert "\n".join(rows) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_blocks_of_the_docs_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs", "exec"), {})


def test_block_of_the_readme_uses_names_that_exist():
    (block,) = python_blocks("README.md")
    compile(block, "README.md", "exec")  # it downloads a model, so it is not run
    import hfnoise

    names = re.search(r"from hfnoise import ([\w, ]+)", block).group(1).split(", ")
    assert all(hasattr(hfnoise, name.strip()) for name in names)
    for attribute in ("flip_rate_estimate", "export_suspects"):
        assert attribute in block
