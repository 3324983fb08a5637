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


def test_blocks_of_the_readme(tmp_path, monkeypatch, capsys):
    on_a_gpu, on_a_cpu = python_blocks("README.md")
    compile(on_a_gpu, "README.md", "exec")  # it downloads a model, so it is not run
    import hfnoise

    names = re.search(r"from hfnoise import ([\w, ]+)", on_a_gpu).group(1).split(", ")
    assert all(hasattr(hfnoise, name.strip()) for name in names)
    for attribute in ("flip_rate_estimate", "export_suspects"):
        assert attribute in on_a_gpu

    monkeypatch.chdir(tmp_path)
    smaller = on_a_cpu.replace("size=640", "size=64").replace("size=200", "size=8")
    assert smaller != on_a_cpu
    exec(compile(smaller, "README.md", "exec"), {})
    assert re.search(r"\d+ of the 50 most suspect labels were flipped", capsys.readouterr().out)


def test_what_the_readme_says_to_run_leaves_nothing_to_commit():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    configs = (ROOT / "examples" / "configs").glob("*_dpo.yaml")
    folders = [re.search(r"^output_dir: (\S+)", path.read_text(encoding="utf-8"), re.M).group(1) for path in configs]
    assert len(folders) >= 2
    assert {f"{name}/" for name in (*folders, "label_audit", "scored_pairs", "demo_output")} <= set(ignored)
