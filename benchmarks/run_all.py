"""`hfnoise bench`: runs the benchmarks of the table, each in a process of its own, and writes one report.

    hfnoise bench                                      # all of them in the small size
    hfnoise bench dr_dpo quantization_size --size full
    hfnoise bench --report_only --output_dir docs      # the report of what is there

Below the folder of the results lie `results/` (those of the full size), `results/small/`, the report `benchmarks.md`
and its picture `results/summary.png`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hfnoise
from hfnoise.benchmarks.published import publish, read_all
from hfnoise.benchmarks.report import write_report
from hfnoise.benchmarks.reporting import write_json
from hfnoise.benchmarks.results import Run, folder_of, read_result, read_runs, runs_file
from hfnoise.benchmarks.table import BENCHMARKS, FAMILIES, PEER_PACKAGES, SIZES, Benchmark
from hfnoise.errors import UsageError
from hfnoise.folders import output_folder

_TAIL = 15


def main(arguments: Sequence[str] | None = None) -> int:
    """Run benchmarks from a command line; exit code 1 if one failed, or missed a bound of its full size."""
    given = _parser().parse_args(arguments)
    chosen = _chosen(given.names)
    folder = output_folder(given.output_dir)
    if given.publish and not (Path(__file__).parent.parent / "setup.py").is_file():
        raise UsageError("--publish writes into the source of hfnoise; this copy is installed. Use a checkout.")
    failed = [] if given.report_only else run_all(chosen, given.size, folder, given.again)
    if given.publish:
        publish(read_all(folder, "full"))
    written = write_report(folder)
    print(f"report: {written}")
    if failed:
        print(f"failed: {', '.join(failed)}; their output is in {folder_of(folder, given.size) / 'logs'}")
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    described, _, example = (__doc__ or "").partition("\n\n")
    listed = []
    for family, title in FAMILIES.items():
        listed.append(f"\n{title}:")
        for one in BENCHMARKS:
            if one.family == family:
                listed.append(f"  {one.name}\n      {one.question}")
    parser = argparse.ArgumentParser(
        prog="hfnoise bench",
        description=f"{described.partition(': ')[2]}\n\n{example}",
        epilog="\n".join(["benchmarks:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks, in the list below; all by default")
    parser.add_argument(
        "--size", choices=SIZES, default="small",
        help="small: ten minutes of one core for all, to see that they work and the direction of what they find; "
        "full: what the documentation quotes, many hours for all (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", default="benchmark_results", help="folder of the report (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="run also what this code has already run in this size")
    parser.add_argument(
        "--publish", action="store_true", help="of a checkout: ship the figures of the full size with the package"
    )
    parser.add_argument("--report_only", action="store_true", help="run nothing, write the report of what is there")
    return parser


def _chosen(names: Sequence[str]) -> list[Benchmark]:
    from difflib import get_close_matches

    known = {one.name: one for one in BENCHMARKS}
    wanted = [name.replace("-", "_") for name in names]
    for name in wanted:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UsageError(f"unknown benchmark {name!r}.{hint} `hfnoise bench --help` lists them.")
    return [one for one in BENCHMARKS if not wanted or one.name in wanted]


def run_all(chosen: Sequence[Benchmark], size: str, folder: Path, again: bool) -> list[str]:
    """Run benchmarks one after the other and return the names of those that failed.

    What the same code has already run with the same settings is kept. `runs.json` is written after each, so that an
    interrupted command goes on where it was.

    Args:
        chosen (`Sequence[Benchmark]`): rows of the table.
        size (`str`): one of `SIZES`.
        folder (`Path`): of the report.
        again (`bool`): whether what is there is run again.
    """
    code, failed = fingerprint(), []
    for number, one in enumerate(chosen, 1):
        head = f"[{number:{len(str(len(chosen)))}}/{len(chosen)}] {one.name}"
        runs = read_runs(folder, size)
        kept = runs.get(one.name)
        if kept and not again and not kept.error and (kept.code, kept.arguments) == (code, one.arguments(size)):
            print(f"{head}: kept, {kept.seconds:.0f} s when it was run")
            continue
        print(f"{head} ...", end=" ", flush=True)
        done = run_one(one, size, folder, code)
        runs[one.name] = done
        write_json(runs_file(folder, size), {name: vars(run) for name, run in runs.items()})
        if done.error:
            failed.append(one.name)
        error = f": {done.error}" if done.error else ""
        print(f"{done.seconds:.0f} s, {done.processor_seconds:.0f} s of the processor{error}", flush=True)
    return failed


def run_one(one: Benchmark, size: str, folder: Path, code: str) -> Run:
    """Run a benchmark in a process of its own and return how it went.

    It writes to a folder of its own, which is emptied into the results once it is through; after an interruption some
    benchmarks go on from what lies there.

    Args:
        one ([`~hfnoise.benchmarks.table.Benchmark`]): a row of the table.
        size (`str`): one of `SIZES`.
        folder (`Path`): of the report.
        code (`str`): [`fingerprint`] of the code that is run.
    """
    results = folder_of(folder, size)
    # The code is in the name: nothing goes on from what another one began.
    unfinished, log = results / "unfinished" / f"{one.name}-{code}", results / "logs" / f"{one.name}.txt"
    for made in (unfinished, log.parent):
        made.mkdir(parents=True, exist_ok=True)
    arguments = one.arguments(size)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    start, before = time.monotonic(), os.times()
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", one.path, *arguments, "--output_dir", str(unfinished)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=_environment())
        # A stopped command must not leave a benchmark behind that takes hours.
        before_term = signal.signal(signal.SIGTERM, _stop)
        try:
            exit_code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before_term)
    seconds, after = time.monotonic() - start, os.times()
    worked = sum(getattr(after, one) - getattr(before, one) for one in ("children_user", "children_system"))
    missing = [name for name in PEER_PACKAGES if find_spec(name) is None]
    run = Run(arguments, code, round(seconds, 1), round(worked, 1), round(load, 1), missing, "")
    if not (unfinished / f"{one.stem}.json").is_file():
        return run.failed(f"failed with exit code {exit_code}: {_last_line(log)}")
    missed = _missed(unfinished / f"{one.stem}.json")
    # Benchmarks end with 1 where a bound is missed, and after a traceback.
    if exit_code and not (exit_code == 1 and missed):
        return run.failed(f"failed with exit code {exit_code}: {_last_line(log)}")
    for path in sorted(unfinished.iterdir()):
        path.replace(results / (one.name + path.name.removeprefix(one.stem) if path.stem == one.stem else path.name))
    shutil.rmtree(unfinished)
    with suppress(OSError):  # something else is unfinished
        unfinished.parent.rmdir()
    # Bounds are of the full size; fewer seeds and repeats may miss them by chance.
    return run.failed("missed: " + "; ".join(missed)) if missed and size == "full" else run


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def fingerprint() -> str:
    """Return a name of the code that would be run: the same in a checkout and in the wheel that is made of it."""
    digest = hashlib.sha256()
    for part in ("hfnoise", "hfnoise.trainers", "hfnoise.pipelines", "hfnoise.benchmarks"):
        spec = find_spec(part)
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError(f"{part} was not found; install hfnoise again.")
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).parts
            # In the wheel the parts lie inside hfnoise.
            inside = part == "hfnoise" and name[0] in ("trainers", "pipelines", "benchmarks", "model_cards")
            if path.suffix in (".py", ".cpp") and not inside:
                digest.update("/".join((part, *name)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _environment() -> dict[str, str]:
    """Return the environment of a benchmark, in which the same copy of hfnoise is found as here."""
    root = str(Path(hfnoise.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _missed(path: Path) -> list[str]:
    found: dict[str, Any] = read_result(path) or {}
    missed = [statement for statement, passed in found.get("acceptance", []) if not passed]
    return missed + (["its claims"] if found.get("claims_hold") is False else [])


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
