"""The table of benchmarks, `hfnoise bench` and the report that is written of the results."""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

import hfnoise
from hfnoise.__main__ import main
from hfnoise.benchmarks import reporting, run_all
from hfnoise.benchmarks.comparison import Comparison, Ratio, divided, geometric, of_summaries, paired
from hfnoise.benchmarks.published import published, read_all
from hfnoise.benchmarks.report import by_quantity, is_against, page
from hfnoise.benchmarks.reporting import mean_and_error
from hfnoise.benchmarks.results import read_runs
from hfnoise.benchmarks.run_all import fingerprint
from hfnoise.benchmarks.table import BENCHMARKS, FAMILIES, Benchmark

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BY_NAME = {one.name: one for one in BENCHMARKS}


def key(one):
    return one.method, one.quantity, one.against


def test_every_benchmark_that_can_be_run_has_a_row():
    runnable = {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()
    }
    assert {one.module for one in BENCHMARKS} == runnable
    assert len(BY_NAME) == len(BENCHMARKS)
    assert {one.family for one in BENCHMARKS} == set(FAMILIES)


@pytest.mark.parametrize("one", BENCHMARKS, ids=lambda one: one.name)
def test_the_options_of_both_sizes_exist(one):
    # What the parser makes of them is tested by the slow test below; this one finds a misspelt option at once.
    tree = ast.parse((ROOT / "benchmarks" / f"{one.module}.py").read_text())
    known = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
        if isinstance(node.args[0], ast.Constant)
    }
    known |= {"--checkpoint"} if "add_subject_options" in ast.unparse(tree) else set()
    known |= {"--rows", "--canaries", "--batch", "--steps"} if one.module == "dp_docstrings" else set()  # of Settings
    given = {word for size in ("small", "full") for word in one.arguments(size) if word.startswith("--")}
    assert given <= known
    assert "--output_dir" in known


def test_a_benchmark_that_can_fail_says_why_in_its_results():
    for module in {one.module for one in BENCHMARKS}:
        text = (ROOT / "benchmarks" / f"{module}.py").read_text()
        can_fail = "return int(" in text.partition("def main(")[2]
        assert can_fail == ('"acceptance"' in text or '"claims_hold"' in text), module


class Parsed(Exception):
    """Ends a benchmark once its command line was read."""


@pytest.mark.slow
def test_the_parsers_take_the_arguments_of_both_sizes(monkeypatch, tmp_path):
    parse = argparse.ArgumentParser.parse_args

    def and_stop(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", and_stop)
    for one in BENCHMARKS:
        for size in ("small", "full"):
            with pytest.raises(Parsed):
                import_module(one.path).main([*one.arguments(size), "--output_dir", str(tmp_path)])


def test_every_row_has_its_results_and_every_result_a_row():
    files = {path.stem for path in (DOCS / "results").glob("*.json")} - {"runs"}
    assert files == set(BY_NAME)
    for one in BENCHMARKS:
        found = json.loads((DOCS / "results" / f"{one.name}.json").read_text())
        assert {"commit", "date", "machine", "versions", "python", "seeds"} <= found.keys()
        assert (DOCS / "results" / f"{one.name}.md").stat().st_size
        for picture in one.pictures:
            assert (DOCS / "results" / f"{picture}.png").is_file()


@pytest.mark.parametrize("one", [one for one in BENCHMARKS if one.compare], ids=lambda one: one.name)
def test_ratios_are_taken_from_the_results(one):
    content = json.loads((DOCS / "results" / f"{one.name}.json").read_text())
    comparisons = one.compare(content)
    assert comparisons
    for each in comparisons:
        assert each.kind in ("stock", "peer")
        assert each.ratio.value > 0
        assert math.isnan(each.ratio.low) or each.ratio.low <= each.ratio.value <= each.ratio.high
        assert each.ratio.spread
    assert len({key(each) for each in comparisons}) == len(comparisons)


def test_ratios_agree_with_the_tables_that_the_documentation_quotes():
    found = {key(each): each for name in BY_NAME for each in published()[name].comparisons}
    robust = found["RobustDPOTrainer", "wrong held-out pairs, 30% of labels flipped", "trl.DPOTrainer"]
    assert robust.ratio.value == pytest.approx((100 - 79.6) / (100 - 70.0), abs=0.002)
    steps = found["clipping per row", "time of a LoRA step", "Opacus, ghost clipping"]
    assert steps.ratio.value == pytest.approx(1.034 / 1.779, abs=0.001)
    packed = found["packed layer, W1A1", "time of a layer, 1 token, 4096 x 4096", "nn.Linear, float32"]
    assert 1 / packed.ratio.value == pytest.approx(45.3, abs=0.1)
    start = found["OneMoreStep", "error of the brightness, exact base", "white noise"]
    assert start.ratio.value == pytest.approx(0.117, abs=0.0005)
    saved = found["AdaptiveGuidance(threshold=0.99)", "evaluations an image, digits", "full guidance"]
    assert 1 - saved.ratio.value == pytest.approx(0.308, abs=0.0005)


def test_what_is_shipped_is_what_lies_in_docs():
    here, shipped = read_all(DOCS, "full"), published()
    assert here.keys() == shipped.keys()
    for name, found in here.items():
        assert [repr(each) for each in found.comparisons] == [repr(each) for each in shipped[name].comparisons]
        assert found.about == shipped[name].about


def test_the_page_of_the_documentation_is_the_report():
    assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == page(DOCS), (
        "run: python -m hfnoise bench --report_only --publish --output_dir docs"
    )


def test_the_page_is_whole():
    text = page(DOCS)
    for one in BENCHMARKS:
        assert f"### {one.name}\n" in text
        assert f"`hfnoise bench {one.name} --size full`" in text
    for place in [part.split(")")[0] for part in text.split("](results/")[1:]]:
        assert (DOCS / "results" / place).is_file(), place
    assert not any(word in text for word in ("nan", "None", str(ROOT), "/tmp"))
    # Each row of a table has as many cells as its head.
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1, block


def test_small_runs_are_short():
    runs = read_runs(DOCS, "small")
    assert runs
    assert runs.keys() <= BY_NAME.keys()
    assert not any(run.error for run in runs.values())
    # A minute at most, and a quarter of an hour in all, of a quiet core; a shared one takes longer for the same.
    assert max(run.processor_seconds for run in runs.values()) < 90
    assert sum(run.processor_seconds for run in runs.values()) < 15 * 60


def test_a_paired_ratio_has_no_error_where_runs_differ_by_a_factor():
    ratio = paired([1.0, 3.0, 2.5], [2.0, 6.0, 5.0])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    # Closed form: residuals -0.5 and 0.5 of ratio 1, standard error 0.5, mean 2.
    ratio = paired([1.5, 2.5], [2.0, 2.0])
    assert (ratio.value, ratio.high) == pytest.approx((1.0, 1.25))


def test_one_run_has_no_spread_and_nothing_is_divided_by_zero():
    assert math.isnan(paired([1.0], [2.0]).low)
    assert math.isnan(divided(1.0, 0.0))
    assert math.isnan(divided(-0.1, 1.0))
    assert math.isnan(paired([1.0, 1.0], [0.0, 0.0]).value)
    assert math.isnan(of_summaries({"mean": 1.0, "error": 0.1}, {"mean": 0.0, "error": 0.1}, "").value)


def test_the_error_of_a_ratio_of_summaries_is_that_of_the_quotient():
    ratio = of_summaries({"mean": 1.0, "error": 0.1}, {"mean": 2.0, "error": 0.1}, "s.e.")
    assert ratio.value == 0.5
    assert ratio.high - 0.5 == pytest.approx(0.5 * math.hypot(0.1, 0.05))


def test_cases_are_summed_up_by_the_geometric_mean():
    ratio = geometric([0.5, 2.0], "cases")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.0, 0.5, 2.0))


def test_against_us_is_what_is_worse_by_more_than_the_spread():
    assert is_against(Ratio(1.1, 1.05, 1.15))
    assert not is_against(Ratio(1.1, 0.95, 1.25))
    assert is_against(Ratio(1.1))
    assert not is_against(Ratio(1.01))
    assert not is_against(Ratio(0.5, 0.4, 0.6))


def comparison(against, kind, ratio):
    return Comparison("ours", "time", against, kind, "", "", Ratio(ratio))


def test_the_summary_shows_the_peer_that_does_best():
    slow, fast, stock = comparison("a", "peer", 0.2), comparison("b", "peer", 1.5), comparison("c", "stock", 0.9)
    assert by_quantity([slow, stock, fast]) == [(stock, fast)]


def test_the_commit_of_another_checkout_is_not_taken_for_ours(tmp_path, monkeypatch):
    # A virtual environment inside somebody else's repository, who has committed something.
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c", "--allow-empty"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    shutil.copy(ROOT / "benchmarks" / "reporting.py", tmp_path)
    monkeypatch.setattr(reporting, "_FOLDER", tmp_path)
    assert reporting.commit() == f"hfnoise {hfnoise.__version__}, installed"


# Tiny benchmarks. They write what a benchmark writes; `state` counts their runs.
TINY = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
parser.add_argument("--state", type=pathlib.Path)
parser.add_argument("--miss", action="store_true")
parser.add_argument("--break", dest="broken", action="store_true")
parser.add_argument("--wait", action="store_true")
given = parser.parse_args()
given.state.write_text(str(int(given.state.read_text()) + 1 if given.state.exists() else 1))
if given.wait:
    time.sleep(60)
if given.broken:
    raise RuntimeError("no such thing")
folder = pathlib.Path(given.output_dir)
content = {"acceptance": [["1 <= 2", True], ["2 <= 1", not given.miss]]}
folder.joinpath("tiny.json").write_text(json.dumps(content))
folder.joinpath("tiny.md").write_text("| a |")
folder.joinpath("tiny_picture.png").write_text("")
sys.exit(int(given.miss))
"""


class Elsewhere(Benchmark):
    """A row whose module is none of hfnoise."""

    @property
    def path(self):
        return self.module


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Return a function that makes a row of a tiny benchmark."""
    (tmp_path / "tiny_benchmark.py").write_text(TINY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def row(name, options=""):
        arguments = f"--state {tmp_path / name}.txt {options}"
        return Elsewhere(name, "tiny_benchmark", "privacy", "?", arguments, arguments, writes="tiny")

    return row


def runs_of(tmp_path, name):
    return int((tmp_path / f"{name}.txt").read_text())


def test_a_failing_benchmark_does_not_end_the_others(tiny, tmp_path, capsys):
    rows = [tiny("broken", "--break"), tiny("fine")]
    assert run_all.run_all(rows, "small", tmp_path, again=False) == ["broken"]
    assert (tmp_path / "results/small/fine.json").is_file()
    assert (tmp_path / "results/small/fine.md").is_file()
    assert (tmp_path / "results/small/tiny_picture.png").is_file()
    said = read_runs(tmp_path, "small")["broken"].error
    assert "exit code 1" in said and "RuntimeError: no such thing" in said
    assert "no such thing" in capsys.readouterr().out
    assert not (tmp_path / "results/small/broken.json").exists()


def test_what_the_same_code_has_run_is_kept(tiny, tmp_path):
    rows = [tiny("broken", "--break"), tiny("fine")]
    for _ in range(2):
        run_all.run_all(rows, "small", tmp_path, again=False)
    assert (runs_of(tmp_path, "fine"), runs_of(tmp_path, "broken")) == (1, 2)
    run_all.run_all(rows[1:], "small", tmp_path, again=True)
    assert runs_of(tmp_path, "fine") == 2
    run_all.run_all([tiny("fine", "--miss")], "small", tmp_path, again=False)  # other arguments
    assert runs_of(tmp_path, "fine") == 3


def test_a_missed_bound_fails_the_full_size_only(tiny, tmp_path):
    assert run_all.run_all([tiny("missing", "--miss")], "small", tmp_path, again=False) == []
    assert run_all.run_all([tiny("missing", "--miss")], "full", tmp_path, again=False) == ["missing"]
    assert (tmp_path / "results/missing.json").is_file()
    assert read_runs(tmp_path, "full")["missing"].error == "missed: 2 <= 1"


def test_runs_of_another_version_are_made_again(tiny, tmp_path):
    (tmp_path / "results/small").mkdir(parents=True)
    (tmp_path / "results/small/runs.json").write_text('{"fine": {"arguments"')
    assert run_all.run_all([tiny("fine")], "small", tmp_path, again=False) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_leaves_no_benchmark_behind(tiny, tmp_path, number):
    tiny("waiting", "--wait")
    program = (
        "import sys, pathlib; from hfnoise.benchmarks import run_all; from hfnoise.benchmarks.table import Benchmark\n"
        "class Elsewhere(Benchmark):\n    path = property(lambda self: self.module)\n"
        f"words = '--wait --state {tmp_path / 'waiting.txt'}'\n"
        "row = Elsewhere('waiting', 'tiny_benchmark', 'privacy', '?', words, words)\n"
        f"run_all.run_all([row], 'small', pathlib.Path({str(tmp_path)!r}), again=False)"
    )
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "waiting.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(child) == 1
    process.send_signal(number)  # to it alone: a terminal would tell the child as well
    assert process.wait(timeout=30) != 0
    assert not Path(f"/proc/{child[0]}").exists()


def test_a_report_of_another_folder_shows_the_shipped_figures_beside_its_own(tmp_path):
    folder = tmp_path / "results" / "small"
    folder.mkdir(parents=True)
    found = json.loads((DOCS / "results" / "dp_step_time.json").read_text())
    for case in found["results"].values():  # as where Opacus is not installed
        case.pop("Opacus hooks"), case.pop("Opacus ghost")
    (folder / "dp_step_time.json").write_text(json.dumps(found))
    run = {
        "arguments": [],
        "code": "",
        "seconds": 1.0,
        "processor_seconds": 1.0,
        "load": 0.0,
        "missing": ["opacus"],
        "error": "",
    }
    failed = {**run, "error": "failed with exit code 1: RuntimeError"}
    (folder / "runs.json").write_text(json.dumps({"dp_step_time": run, "start_gaps": failed}))
    text = page(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("| clipping per row") and "[0.955" in line)
    assert "1.034 / opacus not installed" in line
    assert "Small run: failed with exit code 1" in text


@pytest.mark.slow
def test_a_report_can_be_written_where_nothing_was_run(tmp_path):
    assert main(["bench", "--report_only", "--output_dir", str(tmp_path)]) == 0
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    links = [part.split(")")[0] for part in text.split("](results/")[1:]]
    assert links == ["summary.png"]
    assert (tmp_path / "results" / "summary.png").stat().st_size > 10_000


def test_an_unknown_name_is_refused_with_what_was_meant(capsys, tmp_path):
    assert main(["bench", "dr-dp", "--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "unknown benchmark 'dr_dp'" in said and "Did you mean dr_dpo?" in said


def test_help_lists_all_benchmarks_and_imports_no_library():
    program = (
        "import sys\nfrom hfnoise.__main__ import main\n"
        "try:\n    main(['bench', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'rich', 'numpy') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines()[-1] == "[]"
    for one in BENCHMARKS:
        assert f"  {one.name}\n" in said


def test_the_name_of_the_code_changes_with_the_code_only():
    assert fingerprint() == fingerprint()
    assert len(fingerprint()) == 12


def test_mean_and_error():
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(mean_and_error([1.0])[1])
