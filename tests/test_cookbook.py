"""Every recipe of the cookbook runs, on less data, and prints what the page says it prints."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "cookbook.md").read_text(encoding="utf-8")
RECIPES = {
    title: (code, printed)
    for title, code, printed in re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.M | re.S
    )
}
# The same calls on less data; every replaced text must stand in some recipe.
SMALLER = {
    "size=2000": "size=64",
    "size=6000": "size=64",
    "size=640": "size=64",
    "size=200": "size=16",
    "max_steps=8,": "max_steps=1,",
    "max_steps=12,": "max_steps=1,",
    "max_steps=20,": "max_steps=1,",
    "max_steps=100,": "max_steps=5,",
    "target_epsilon=8,": "noise_multiplier=1.0,",  # calibration has its own tests
    "expected_batch_size=128": "expected_batch_size=16",
    "per_device_train_batch_size=32": "per_device_train_batch_size=8",
    '"per_device_train_batch_size": 32': '"per_device_train_batch_size": 16',
    '"num_inference_steps": 20': '"num_inference_steps": 6',
    "num_inference_steps=20": "num_inference_steps=6",
    "num_inference_steps=10": "num_inference_steps=4",
    "noises_per_prompt=16": "noises_per_prompt=4",
    "budget=40": "budget=16",
}
# What depends on data and noise: numbers, and the list of stopped steps.
NUMBER = r"-?\d[\d,]*\.?\d*(?:e-\d+)?"


def smaller(code):
    for text, replacement in SMALLER.items():
        code = code.replace(text, replacement)
    return code


def shape(line):
    """Return a line with its numbers left out."""
    return re.sub(r"; (?:stopped at steps? .*|never stopped)", "", re.sub(NUMBER, "#", line))


def test_the_recipes_are_found_and_made_smaller():
    assert len(RECIPES) == PAGE.count("```python") == PAGE.count("\n## ") == 7
    assert not [text for text in SMALLER if text not in PAGE]


@pytest.mark.parametrize(
    "title",
    # A Trainer takes seconds even for a step: the pipelines are in CI, and `make soak` runs all.
    [pytest.param(t, marks=pytest.mark.slow if "pipe" in code and "Trainer" not in code else pytest.mark.soak)
     for t, (code, _) in RECIPES.items()],
)  # fmt: skip
# Said on machines without an accelerator only, by transformers' default; by `Dataset.sort` with pyarrow 25.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:Specifying null_placement in SortOptions:FutureWarning")
def test_recipe(title, tmp_path, monkeypatch, capsys):
    code, printed = RECIPES[title]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hfnoise.trainers.private_dataset.HF_HOME", str(tmp_path / "hf_home"))
    recipe = ModuleType("recipe")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "recipe", recipe)
    exec(compile(smaller(code), title, "exec"), vars(recipe))
    shown = {shape(line) for line in capsys.readouterr().out.splitlines()}
    missing = [line for line in printed.splitlines() if shape(line) not in shown]
    assert not missing, f"the page says {missing}, the recipe printed {shown}"
