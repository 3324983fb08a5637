"""The benchmark of the kernels runs, and writes what it prints."""

import json

import pytest

from hfnoise.benchmarks import quantization_kernels


@pytest.mark.slow
def test_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization_kernels, "CASES", {"1 token": (1, 256, 128), "3 tokens": (3, 128, 256)})
    arguments = ["--repeats", "1", "--threads", "1", "--cases", "1 token", "3 tokens", "--output_dir", str(tmp_path)]
    assert quantization_kernels.main(arguments) in (0, 1)  # the claims are about larger weights
    report = json.loads((tmp_path / "quantization_kernels.json").read_text())
    assert list(report["speed_ups"]) == ["1 token, 1 thread"]
    times = report["results"]["3 tokens, 1 thread"]
    assert {"float32", "bfloat16", "torch._int_mm (W8A8)", "hfnoise W1A1", "hfnoise W4A4"} <= set(times)
    assert all(seconds > 0 for parts in times.values() for seconds in parts.values())
    assert "hfnoise W2A2" in (tmp_path / "quantization_kernels.md").read_text()
    assert (tmp_path / "quantization_kernels.png").stat().st_size > 10_000
