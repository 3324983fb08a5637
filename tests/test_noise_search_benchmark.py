"""The benchmark of noise search: its bounds, and that it runs from its command line."""

import json

import pytest

from hfnoise.benchmarks.noise_search import PLAIN, acceptance, best_of, bound, main


def found(plain=0.8, two=0.95, spent=20):
    rows = {PLAIN: (plain, 10), best_of(2): (two, spent)}
    return {name: [{"judge_accuracy": right, "verifier_score": right - 1.0, "evaluations": cost}]
            for name, (right, cost) in rows.items()}  # fmt: skip


def test_bounds_can_be_missed():
    counts = {PLAIN: 1, best_of(2): 2}
    assert bound(0.8, 1) == pytest.approx(0.8) and bound(0.8, 2) == pytest.approx(0.96)
    assert all(passed for _, passed in acceptance(found(), counts, 10, 1000))
    missed = {
        "spends its budget": found(spent=19), "grows with N": found(two=0.7), "at most 96.0%": found(two=1.0),
        "more right images": found(two=0.8),
    }  # fmt: skip
    for words, rows in missed.items():
        (failed, *_) = [text for text, passed in acceptance(rows, counts, 10, 1000) if not passed]
        assert words in failed


@pytest.mark.slow
def test_it_runs_from_the_command_line(tmp_path):
    options = ["--images", "10", "--seeds", "0", "--steps", "3", "--budgets", "3", "--preview_steps", "1"]
    main([*options, "--output_dir", str(tmp_path)])
    assert "| paths, 3 | 3 | 9 |" in (tmp_path / "noise_search.md").read_text()
    content = json.loads((tmp_path / "noise_search.json").read_text())
    spent = {name: one[0]["evaluations"] for name, one in content["runs"].items()}
    assert spent == {
        PLAIN: 3, "best of 3": 9, "zero-order, 3": 9, "paths, 3": 9, "best of previews, 3": 9,
    }  # fmt: skip
    assert content["runs"]["best of previews, 3"][0]["candidates"] == 9
    assert content["acceptance"][0][1] is True
