"""The benchmark of QuEST's claim can fail, and runs."""

import json

import pytest

from hfnoise.benchmarks import quantization_training as benchmark

GOOD = {"fp 32": 2.10, "quest W4A4": 2.18, "quest W2A2": 2.37, "quest W1A1": 2.53, "ste_rms W1A1": 2.75}


def test_acceptance():
    assert [passed for _, passed in benchmark.acceptance(GOOD)] == [True] * 4
    worse = {"quest W1A1": 2.64, "quest W2A2": 2.43, "quest W4A4": 2.23}
    assert [passed for _, passed in benchmark.acceptance(GOOD | worse)] == [False] * 4
    assert benchmark.acceptance({"fp 32": 2.1}) == []


@pytest.mark.slow
def test_a_short_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "_HELD_OUT_ROWS", 8)
    arguments = ["--steps", "2", "--seeds", "0", "1", "--methods", "fp", "quest", "lsq", "--weight_bits", "1"]
    assert benchmark.main([*arguments, "--step_rates", "0.1", "0.01", "--output_dir", str(tmp_path)]) == 1
    assert "MISS QuEST at 1 bit" in capsys.readouterr().out
    results = json.loads((tmp_path / "quantization_training.json").read_text())["results"]
    assert set(results) == {"fp 32", "quest W1A1", "lsq W1A1"} and set(results["lsq W1A1"]["step_rates"]) == {
        "0.1",
        "0.01",
    }
    assert len({run["loss"] for one in results.values() for run in one["runs"]}) == 6
    assert (tmp_path / "quantization_training.png").stat().st_size > 1000
