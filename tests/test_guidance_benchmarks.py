"""The benchmarks of guidance: their arithmetic, and that each runs from its command line."""

import json
import math
from pathlib import Path

import numpy
import pytest
import torch

from hfnoise.benchmarks import guidance_mixture
from hfnoise.benchmarks.guidance_mixture import Point, evaluations_at
from hfnoise.benchmarks.structural_similarity import structural_similarity
from hfnoise.worlds.gaussian_mixture import random_mixture


def images(seed=0):
    return torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_similarity_is_the_formula_in_the_middle_of_its_window():
    """One window, 7 x 7: weighted moments written out."""
    one, other = images(0)[:1, :1, :7, :7].double(), images(1)[:1, :1, :7, :7].double()
    places = torch.arange(7, dtype=torch.float64) - 3
    weights = torch.exp(-(places[:, None] ** 2 + places**2) / (2 * 1.5**2))
    weights /= weights.sum()

    def mean(values):
        return float((weights * values[0, 0]).sum())

    mu, nu = mean(one), mean(other)
    var, wide, cov = mean(one**2) - mu**2, mean(other**2) - nu**2, mean(one * other) - mu * nu
    expected = (2 * mu * nu + 1e-4) * (2 * cov + 9e-4) / ((mu**2 + nu**2 + 1e-4) * (var + wide + 9e-4))
    assert structural_similarity(one, other).item() == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(structural_similarity(images(), images()), torch.ones(3))
    slightly, much = (structural_similarity(images(), images() + size * images(1)) for size in (0.01, 0.3))
    assert (much < slightly).all() and (slightly < 1).all()


def test_similarity_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="at least 7 pixels"):
        structural_similarity(images()[..., :6], images()[..., :6])


def test_evaluations_at_an_error_lie_between_settings():
    points = [Point("m", "", 20.0, 0.1), Point("m", "", 40.0, 0.001), Point("m", "", 30.0, 0.01)]
    assert evaluations_at(points, 0.01) == pytest.approx(30.0)
    assert evaluations_at(points, math.sqrt(0.1 * 0.01)) == pytest.approx(25.0)
    assert evaluations_at(points, 0.2) is None and evaluations_at(points, 0.0001) is None


def test_the_mixture_of_the_benchmark_has_the_levels_of_the_golden_one():
    golden = numpy.load(Path(__file__).parent / "vectors" / "guidance" / "dev_gmm_ref.npz")
    mixture = random_mixture()
    torch.testing.assert_close(mixture.sigmas, torch.as_tensor(golden["sigmas"]), rtol=0, atol=1e-5)
    assert {name: tuple(array.shape) for name, array in mixture.vectors.items()} == {
        name: golden[name].shape for name in mixture.vectors
    }
    with pytest.raises(ValueError, match="at least 1"):
        random_mixture(0)


def test_rules_on_the_mixture():
    found = {(point.method, point.setting): point for point in guidance_mixture.measure(0, 99, 8)}
    # The paper's threshold on eps stops every sample at its first step: 2 + 19 evaluations.
    assert found["Adaptive Guidance on eps", "threshold 0.991"].evaluations == 21
    adaptive = found["Adaptive Guidance on x0", "threshold 0.999"]
    assert adaptive.evaluations < 34 and adaptive.error < 0.05
    early, late = (found["fixed cut-off", f"{steps} steps guided"].error for steps in (8, 17))
    assert late < 1e-6 and early > 0.1


def test_stock_projection_is_what_diffusers_computes():
    from diffusers.guiders import AdaptiveProjectedGuidance

    from hfnoise.benchmarks.guidance_saturation import stock_projected
    from hfnoise.pipelines.projected_guider import auto_norm_threshold

    assert auto_norm_threshold(4 * 128 * 128) == 15.0 and auto_norm_threshold(256) == pytest.approx(15 / 16)
    options = {"eta": 0.0, "momentum": -0.5, "norm_threshold": 2.0, "use_original_formulation": True}
    ours = stock_projected(**options)
    theirs = AdaptiveProjectedGuidance(
        4.0, adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=2.0, eta=0.0,
        use_original_formulation=True,
    )  # fmt: skip
    ours.guidance_scale = 4.0
    for step, seed in enumerate((0, 1)):
        cond, uncond = images(seed)[:2], images(seed + 5)[:2]
        for guider in (ours, theirs):
            guider.set_state(step, 2, torch.tensor(999 - step))
        theirs.prepare_inputs({"x": (cond, uncond)})  # where it makes its momentum
        torch.testing.assert_close(ours(_batches(ours, cond, uncond)).pred, theirs.forward(cond, uncond).pred)


def _batches(guider, cond, uncond):
    batches = guider.prepare_inputs({"x": (cond, uncond)})
    for batch, prediction in zip(batches, (cond, uncond), strict=True):
        batch.noise_pred = prediction
    return batches


def test_exactness_of_a_family():
    from hfnoise.benchmarks.guidance_exactness import measure, table
    from hfnoise.worlds.tiny_pipelines import FAMILIES

    found = measure(FAMILIES["sd-ddim"])
    assert found.passed and found.rows == (4, 4, 4, 4) and found.mixed_rows == (4, 3, 3, 2)
    header, rows = table({"sd-ddim": found})
    assert len(rows[0]) == len(header) and rows[0][2:5] == ["batched", "0, bitwise", "0, bitwise"]


def test_bounds_of_the_digits_are_checked():
    from hfnoise.benchmarks.guidance_tables import acceptance, table

    full = {
        "evaluations": 40.0, "verifier_accuracy": 1.0, "judge_accuracy": 1.0, "frechet_distance": 9.0, "ssim": 1.0,
        "diversity": 5.0, "latent_error": 0.0,
    }  # fmt: skip
    ours = {**full, "evaluations": 28.0, "verifier_accuracy": 0.995, "ssim": 0.94}
    found = {"20 steps": {"full": [full, full], "ours": [ours, ours]}}
    times = {"20 steps": {"ours": {"time_saved_per_rows_saved": 0.95}}}
    assert [passed for _, passed in acceptance(found, times, "full", "ours")] == [True, True, False, True]
    header, rows = table(found["20 steps"], "full")
    assert (
        [len(row) for row in rows] == [len(header)] * 2 and rows[1][2] == "30.0 ± 0.0" and rows[1][4] == "-0.5 ± 0.0"
    )


@pytest.mark.slow
def test_mixture_runs(tmp_path, capsys):
    assert guidance_mixture.main(["--seeds", "0", "1", "--samples", "8", "--output_dir", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "guidance_mixture.json").read_text())
    assert len(written["runs"]) == 2 and written["seeds"] == [0, 1]
    assert (tmp_path / "guidance_mixture.png").stat().st_size > 0


@pytest.mark.slow
def test_digits_run(tmp_path, capsys):
    from hfnoise.benchmarks.guidance_digits import ADAPTIVE, FULL, main
    from hfnoise.errors import UsageError

    settings = [
        "--output_dir",
        str(tmp_path),
        "--repeats",
        "1",
        "--timed_images",
        "10",
        "--images",
        "10",
        "--fitted_images",
        "10",
    ]
    with pytest.raises(UsageError, match="--fitting_seed 0 is among"):
        main([*settings, "--fitting_seed", "0"])
    main([*settings, "--seeds", "0", "1", "--steps", "4", "--scales", "4"])
    written = json.loads((tmp_path / "guidance_digits.json").read_text())
    runs = written["runs"]["4 steps, scale 4"]
    assert runs[FULL][0]["evaluations"] == 8 and runs[FULL][0]["ssim"] == pytest.approx(1)
    assert runs[ADAPTIVE][0]["evaluations"] < 8 and len(runs[ADAPTIVE]) == 2
    assert written["peers"]["callback_difference"] == 0  # at one image, the same cut-off
    assert written["peers"]["callback_batch"].startswith("RuntimeError")
    assert "FasterCache" in (tmp_path / "guidance_digits.md").read_text()


@pytest.mark.slow
def test_saturation_runs(tmp_path, capsys):
    from hfnoise.benchmarks.guidance_saturation import CFG, OURS, main

    settings = ["--seeds", "0", "--images", "10", "--steps", "6", "--scales", "15"]
    assert main([*settings, "--output_dir", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "guidance_saturation_digits.json").read_text())
    found = {name: by_scale["15"]["saturation"]["mean"] for name, by_scale in written["summary"].items()}
    assert found[OURS] < found["APG of diffusers, options of the paper"] < found[CFG]
    assert (tmp_path / "guidance_pictures_digits.png").stat().st_size > 0


@pytest.mark.slow
def test_overhead_runs(tmp_path, capsys):
    from hfnoise.benchmarks.guidance_overhead import STOCK, main

    settings = ["--tiny", "--size", "16", "--steps", "4", "--repeats", "2", "--unet_repeats", "1"]
    main([*settings, "--output_dir", str(tmp_path)])  # its bounds are of a UNet of real size
    written = json.loads((tmp_path / "guidance_overhead.json").read_text())
    assert written["guiders"][STOCK]["added_microseconds"] == 0
    assert all(one["added_reads"] <= 3 for one in written["guiders"].values())
    assert written["rule"]["float32_error"] < 2e-6
