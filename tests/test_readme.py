"""README and docs say what the code says: the table of methods, and every Python block of the paper index runs."""

import re
from pathlib import Path

import pytest

from hfnoise.benchmarks.headlines import headline
from hfnoise.methods import METHODS

ROOT = Path(__file__).parent.parent


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


PYTHON_BLOCKS = [
    block
    for page in (
        "papers",
        "preference",
        "dr_dpo",
        "reasoning_traces",
        "privacy",
        "from_opacus",
        "fedsvd",
        "quantization",
        "guidance",
        "one_more_step",
        "diffusion_training",
        "golden_noise",
        "hub",
    )
    for block in python_blocks(f"docs/{page}.md")
]
# The same calls on less data. Calibrating the noise takes seconds, and its own tests are elsewhere.
SMALLER = {
    "size=640": "size=64",
    "size=200": "size=8",
    "size=6000": "size=64",
    "range(1024)": "range(32)",
    "num_train_epochs=3": "num_train_epochs=1",
    "max_steps=12": "max_steps=1",
    "target_epsilon=8,": "noise_multiplier=1.0,",
    "target_epsilon=3.0,": "noise_multiplier=1.0,",
    "expected_batch_size=128": "expected_batch_size=16",
    "size=1200": "size=60",
    "range(400 * n, 400 * n + 400)": "range(20 * n, 20 * n + 20)",
    "per_device_train_batch_size=64": "per_device_train_batch_size=8",
    "rounds=3, local_steps=2": "rounds=1, local_steps=1",
    "target_epsilon=6)": "noise_multiplier=1.0)",
    "num_inference_steps=20": "num_inference_steps=4",
    "max_steps=20": "max_steps=2",
    "noises_per_prompt=16": "noises_per_prompt=2",
    "budget=40": "budget=20",
    "guidance_scale=4.0)": "guidance_scale=4.0, num_inference_steps=8)",
    '{digit}"] * 8': '{digit}"] * 2',
}


def smaller(block):
    """Return a block with less data; every name that is replaced stays a name that the class knows."""
    for text, replacement in SMALLER.items():
        block = block.replace(text, replacement)
    return block


def test_table_of_methods():
    rows = [
        f"| `{method.name}` | `{method.main_class}` | {method.stock} "
        f"| {headline(method.name)} | [{method.paper}](https://arxiv.org/abs/{method.paper}) |"
        for method in METHODS
    ]
    assert "\n".join(rows) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_names_in_the_docs_are_public():
    import hfnoise

    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    # Calls, also outside of blocks; a module has more dots.
    named = {name for page in pages for name in re.findall(r"\bhfnoise\.(\w+)\(", page.read_text(encoding="utf-8"))}
    assert "start_gap" in named and not [name for name in named if not hasattr(hfnoise, name)]


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Run in an empty folder, with secrets and ledgers below it and not in the tester's home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hfnoise.trainers.private_dataset.HF_HOME", str(tmp_path / "hf_home"))
    return tmp_path


# Said on machines without an accelerator only, by transformers' default.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_blocks_of_the_docs_run(block, empty_folder):
    code = compile(smaller(block), "docs", "exec")
    if "from opacus" in block:  # it is not installed
        return
    exec(code, {})


def test_blocks_of_the_readme(empty_folder, capsys):
    on_a_cpu, on_a_gpu, private, one_bit, guided, brightness, golden = python_blocks("README.md")
    compile(on_a_gpu, "README.md", "exec")  # it downloads a model, so it is not run
    import hfnoise

    names = re.search(r"from hfnoise import ([\w, ]+)", on_a_gpu).group(1).split(", ")
    assert all(hasattr(hfnoise, name.strip()) for name in names)
    for attribute in ("flip_rate_estimate", "export_suspects"):
        assert attribute in on_a_gpu

    assert smaller(on_a_cpu) != on_a_cpu
    exec(compile(smaller(on_a_cpu), "README.md", "exec"), {})
    assert re.search(r"\d+ of the 50 most suspect labels were flipped", capsys.readouterr().out)

    exec(compile(smaller(private), "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert re.search(r"held-out loss \d\.\d\d before, \d\.\d\d after", shown)
    # A noise multiplier of 1, a batch of 16 of 64, one step: delta 1e-5.
    assert "1e-05)-differentially private with respect to adding or removing one unit (row; 64 of them)." in shown
    assert list(empty_folder.glob("hf_home/hfnoise/privacy/*/ledger.json"))

    exec(compile(one_bit, "README.md", "exec"), {})
    assert re.search(r"21 weights quantised: [\d,]+ entries at 1\.\d+ bits", capsys.readouterr().out)

    exec(compile(smaller(guided), "README.md", "exec"), {})
    exec(compile(smaller(brightness), "README.md", "exec"), {})
    exec(compile(smaller(golden), "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert re.search(r"8 samples, 8 steps: \d+ of 128 evaluations, \d+\.\d % saved; .*stopped", shown)
    assert (empty_folder / "seven.png").is_file()


@pytest.mark.slow  # calibrates six plans
def test_the_budget_that_the_docs_show(capsys):
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    command = re.search(r"`hfnoise dp-budget (.*?)` prints:", page).group(1)
    from hfnoise.privacy.budget import main

    assert main(command.split()) == 0
    shown = capsys.readouterr().out
    # The versions of libraries may differ; the numbers may not.
    lines = [line for line in shown.splitlines() if line and not line.startswith("accountant")]
    assert len(lines) == 15 and all(line in page for line in lines)


def test_what_the_readme_says_to_run_leaves_nothing_to_commit():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    configs = (ROOT / "examples" / "configs").glob("*_dpo.yaml")
    folders = [re.search(r"^output_dir: (\S+)", path.read_text(encoding="utf-8"), re.M).group(1) for path in configs]
    assert len(folders) >= 2
    written = (*folders, "label_audit", "scored_pairs", "demo_output", "generated")
    assert {f"{name}/" for name in written} <= set(ignored)
