"""The benchmark of refined starts: plain runs of equal cost, win rates, bounds; and all of it on a few images."""

import copy
import json

import pytest
import torch

from hfnoise.benchmarks.golden_noise import main
from hfnoise.benchmarks.golden_noise_scores import (
    best_plain,
    no_worse_plain,
    search_bound,
    share_interval,
    win_rate,
)
from hfnoise.benchmarks.golden_noise_starts import Plain, plain_runs
from hfnoise.benchmarks.golden_noise_tables import acceptance


def score(accuracy, distance, **more):
    return {
        "judge_accuracy": {"mean": accuracy}, "frechet_distance": {"mean": distance}, "evaluations": 10, **more,
    }  # fmt: skip


FOUND = {
    "plain": {Plain(10, 1.0): score(0.8, 10.0)},
    "refined": {
        1.0: {
            "ReDenoise": score(0.95, 9.0),
            "NoisePromptNet": score(0.95, 9.0),
            "best of 2": score(0.95, 9.0, evaluations=20),
            "best of 4": score(0.99, 9.0, evaluations=40),
        }
    },
    "nets": {
        "NPNet in miniature": {"r2": 0.7, "parameters": 100},
        "NoisePromptNet": {"r2": 0.85, "parameters": 200, "cost": 0.5},
    },
    "images": 300,
}


def missed(**changes):
    """Return the statements that do not hold after some changes, each a path and a value."""
    found = copy.deepcopy(FOUND)
    for path, value in changes.values():
        part = found
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value
    return [statement for statement, met in acceptance(found, 10) if not met]


def test_each_bound_can_be_missed():
    assert missed() == []
    for path, value, word in [
        (("refined", 1.0, "ReDenoise"), score(0.85, 9.0), "ReDenoise gains"),
        (("refined", 1.0, "NoisePromptNet"), score(0.95, 11.0), "Fréchet"),
        (("nets", "NoisePromptNet", "r2"), 0.75, "explains"),
        (("nets", "NoisePromptNet", "parameters"), 301, "parameters"),
        (("nets", "NoisePromptNet", "cost"), 1.1, "takes"),
        (("refined", 1.0, "best of 2"), score(1.0, 9.0, evaluations=20), "best of 2"),
        (("refined", 1.0, "best of 4", "evaluations"), 41, "budget"),
    ]:
        assert [word in statement for statement in missed(one=(path, value))] == [True]
    assert all("CFG 1" not in one for one, _ in acceptance({**FOUND, "refined": {}}, 10))


def test_plain_runs_cost_what_refined_ones_do():
    runs = plain_runs(10, [1.0, 2.0])
    assert {run.evaluations for run in runs if run.scale == 1.0} == {10, 13, 20, 40}
    # 12 for the 13 of a run without guidance and ReDenoise, 22 for 23: never more.
    assert {run.evaluations for run in runs if run.scale == 2.0} == {12, 20, 22, 40, 80}
    plain = {Plain(10, 1.0): score(0.8, 9.0), Plain(6, 2.0): score(0.9, 8.0), Plain(10, 2.0): score(0.95, 5.0)}
    assert best_plain(plain, 13, "judge_accuracy") == Plain(6, 2.0)
    assert best_plain(plain, 11, "frechet_distance") == Plain(10, 1.0)
    assert best_plain(plain, 20, "frechet_distance") == Plain(10, 2.0)
    assert no_worse_plain(score(0.9, 8.5, evaluations=13), plain) == Plain(6, 2.0)
    assert no_worse_plain(score(0.9, 8.5, evaluations=20), plain) == Plain(10, 2.0)
    assert no_worse_plain(score(0.85, 7.5, evaluations=13), plain) is None
    assert no_worse_plain(score(0.92, 8.5, evaluations=13), plain) is None


def test_win_rates_and_intervals():
    own = {"log_probability": torch.tensor([0.0, -1.0, -2.0, -3.0])}
    other = {"log_probability": torch.tensor([-1.0, -2.0, -2.0, -1.0])}
    rate = win_rate(own, other)
    assert rate["mean"] == 0.625
    assert rate["low"] < 0.625 < rate["high"]
    # 81 of 263, the example of Newcombe 1998 (Statistics in Medicine 17, 857), method 3.
    assert share_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert share_interval(1.0, 300)[1] == 1.0
    assert search_bound(0.8, 2) == pytest.approx(0.96)


@pytest.mark.slow
def test_it_runs(tmp_path, capsys):
    given = ["--preset", "small", "--steps", "2", "--scales", "1", "--output_dir", str(tmp_path)]
    assert main(given) in (0, 1)
    written = json.loads((tmp_path / "golden_noise_digits.json").read_text())["results"]
    plain, starts = written["plain"]["CFG 1, 2 steps"], written["refined"]["1.0"]
    evaluations = {name: one["evaluations"] for name, one in starts.items()}
    assert evaluations["ReDenoise"] == plain["evaluations"] + 3 == 5
    assert evaluations["NoisePromptNet"] == 3
    assert evaluations["Noise Level Guidance, 5 steps"] == 12
    assert evaluations["best of 4"] == evaluations["zero-order search"] == evaluations["search over paths"] == 8
    assert written["variations"]["one seed"]["diversity"]["mean"] == 0.0
    text = (tmp_path / "golden_noise_digits.md").read_text()
    assert "NPNet in miniature" in text
    assert "ReDenoise gains" in capsys.readouterr().out
    for name in ("golden_noise_digits.png", "golden_noise_pictures_digits.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
