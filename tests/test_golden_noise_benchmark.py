"""The benchmark of refined starts, on a few images: it runs, writes, and says whether its bounds are met."""

import json

import pytest

from hfnoise.benchmarks.golden_noise import acceptance, main


@pytest.mark.slow
def test_it_runs(tmp_path, capsys):
    given = ["--images", "20", "--seeds", "1", "--steps", "2", "--scales", "1", "--output_dir", str(tmp_path)]
    assert main(given) in (0, 1)
    written = json.loads((tmp_path / "golden_noise_digits.json").read_text())
    starts = written["results"]["1.0"]
    assert starts["ReDenoise"]["evaluations"]["mean"] == starts["plain"]["evaluations"]["mean"] + 3 == 5
    assert starts["Noise Level Guidance, 5 steps"]["evaluations"]["mean"] == 12
    assert "ReDenoise gains" in capsys.readouterr().out


def test_bounds_can_be_missed():
    def row(accuracy, distance):
        return {"judge_accuracy": {"mean": accuracy}, "frechet_distance": {"mean": distance}}

    def passed(golden):
        return [met for _, met in acceptance({1.0: {"plain": row(0.8, 10.0), "ReDenoise": golden}})]

    assert passed(row(0.95, 9.0)) == [True, True]
    assert passed(row(0.85, 11.0)) == [False, False]
    assert acceptance({2.0: {}}) == []
