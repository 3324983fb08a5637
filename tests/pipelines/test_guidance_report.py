"""The report of a guided run: what it says in a line, its file, its picture, several batches in one."""

import json

import pytest
import torch

from hfnoise.pipelines import AdaptiveGuidance, GuidanceReport, ProjectedGuidance, guide
from hfnoise.worlds.digits_pipeline import new_digits_pipeline

NAN = float("nan")


def report(stops=(2, 1), rows=(4, 3, 2), trace=((0.5, 0.999), (0.9991, NAN), (NAN, NAN)), **more):
    return GuidanceReport(torch.tensor(trace), tuple(stops), tuple(rows), len(stops), **more)


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (report(), "2 samples, 3 steps: 9 of 12 evaluations, 25.0 % saved; stopped at steps 1 to 2"),
        (
            report(stops=(None, 1), rows=(4, 3, 3)),
            "2 samples, 3 steps: 10 of 12 evaluations, 16.7 % saved; 1 of 2 stopped, at step 1",
        ),
        (
            report(stops=(None, None), rows=(4, 4, 4)),
            "2 samples, 3 steps: 12 of 12 evaluations, none saved; none stopped",
        ),
        (
            report(stops=(None,), rows=(2,), trace=((NAN,),)),
            "1 sample, 1 step: 2 of 2 evaluations, none saved",
        ),
    ],
)  # fmt: skip
def test_the_line(made, line):
    assert str(made) == line and repr(made) == f"<GuidanceReport: {line}>"  # in a notebook, too


def test_what_each_sample_cost_adds_up():
    assert report().sample_evaluations == (5, 4)
    # The detecting step of at_detection="cond" is evaluated, though guidance has ended.
    at_detection = report(stops=(1, 0), rows=(4, 3, 2))
    assert at_detection.sample_evaluations == (5, 4)
    # A compiled model, where only whole batches stop: the second sample goes on with the first.
    assert report(rows=(4, 4, 2)).sample_evaluations == (5, 5)
    # Estimated steps (LinearGuidance) cost nothing for anybody; three predictions (pix2pix) two.
    assert report(stops=(None, None), rows=(4, 2, 4), trace=((NAN, NAN),) * 3).sample_evaluations == (5, 5)
    assert report(stops=(2, 1), rows=(6, 4, 2), predictions=3).sample_evaluations == (7, 5)


def test_of_a_real_run():
    pipe = new_digits_pipeline(width=8)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    with guide(pipe, AdaptiveGuidance(threshold=0.99)):
        pipe(["the digit seven"] * 3, num_inference_steps=5, generator=generators, output_type="latent")
        made = pipe.guidance_report
    assert sum(made.sample_evaluations) == made.evaluations
    assert made.sample_evaluations == tuple(5 + (5 if stop is None else stop) for stop in made.stop_steps)


def test_a_file_gives_back_the_report(tmp_path):
    made = report(stops=(None, 1), rows=(4, 3, 3))
    made.save(tmp_path / "new" / "report.json")
    entries = json.loads((tmp_path / "new" / "report.json").read_text())
    assert entries["summary"] == str(made) and entries["similarity"][1][1] is None  # NaN is not JSON
    loaded = GuidanceReport.load(tmp_path / "new" / "report.json")
    torch.testing.assert_close(loaded.similarity, made.similarity, rtol=0, atol=0, equal_nan=True)
    assert (loaded.stop_steps, loaded.rows, loaded.batch) == (made.stop_steps, made.rows, made.batch)


@pytest.mark.parametrize("text", ["[]", "{", '{"format": 1}', '{"format": 1, "similarity": 3}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match="no guidance report of hfnoise|of format None"):
        GuidanceReport.load(tmp_path / "report.json")


def test_a_later_format_is_refused():
    with pytest.raises(ValueError, match="of format 2; this version reads 1"):
        GuidanceReport.from_dict({**report().to_dict(), "format": 2})


def test_batches_are_joined():
    both = GuidanceReport.join([report(), report(stops=(None, 2), rows=(4, 4, 3))])
    assert both.batch == 4 and both.rows == (8, 7, 5) and both.stop_steps == (2, 1, None, 2)
    assert both.similarity.shape == (3, 4) and both.evaluations == 20
    with pytest.raises(ValueError, match=r"one number of steps and of predictions .* \[\(1, 2\), \(3, 2\)\]"):
        GuidanceReport.join([report(), report(stops=(None,), rows=(2,), trace=((NAN,),))])


def picture(path):
    """Return the pixels of an image file as integers."""
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB")).astype(int)


def count(pixels, colour):
    """Return how many pixels have about that colour."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return int((abs(pixels - wanted).max(axis=2) < 8).sum())


def test_the_picture_shows_traces_stops_and_rows(tmp_path):
    report().plot(tmp_path / "new" / "report.png", threshold=0.99)
    pixels = picture(tmp_path / "new" / "report.png")
    unconditional, conditional = "#ee8866", "#4477aa"
    # Bars: three unconditional rows of nine, six conditional ones, beside the legend.
    assert 0.4 < count(pixels, unconditional) / count(pixels, conditional) < 0.6
    assert count(pixels, "#1f77b4") > 100 and count(pixels, "#ff7f0e") > 50  # a trace for each sample


@pytest.mark.slow
def test_the_picture_of_full_guidance(tmp_path):
    report().plot(tmp_path / "report.png")
    report(stops=(None, None), rows=(4, 4, 4)).plot(tmp_path / "all.png")
    stopped, full = picture(tmp_path / "report.png"), picture(tmp_path / "all.png")
    assert 0.9 < count(full, "#ee8866") / count(full, "#4477aa") < 1.1
    # The stops are large dots.
    assert count(full, "#1f77b4") < count(stopped, "#1f77b4")


@pytest.mark.slow
def test_the_picture_without_similarities_has_rows_only(tmp_path):
    pipe = new_digits_pipeline(width=8)
    with guide(pipe, ProjectedGuidance()):
        pipe("the digit seven", num_inference_steps=2, output_type="latent")
        pipe.guidance_report.plot(tmp_path / "report.png")
    pixels = picture(tmp_path / "report.png")
    assert pixels.shape[0] < pixels.shape[1] * 0.6 and count(pixels, "#1f77b4") == 0
    assert count(pixels, "#ee8866") > 1000
