"""Refined starts against plain runs, at equal numbers of network evaluations.

`python -m hfnoise.benchmarks.golden_noise` trains three networks of golden noise on pairs of a digits world, and draws
it from plain noise, and from noise refined by them, by ReDenoise, Noise Level Guidance, SeedVariation,
ConditioningNoise and three searches, at several guidance scales. Written are golden_noise.json, .md and .png, and
golden_noise_pictures.png (named after the checkpoint): accuracy by a judge that nothing was chosen by, Fréchet
distance, diversity, win rates, evaluations an image, time of the processor.

Beside each start stands what plain runs make of as many evaluations, with more steps or with more guidance: refinement
acts as guidance does, alignment up and diversity down, and is flattered without them. An evaluation is one prediction
of the UNet for one image, with prompt or without.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from hfnoise.benchmarks.golden_noise_nets import trained_nets
from hfnoise.benchmarks.golden_noise_pictures import grid, plot
from hfnoise.benchmarks.golden_noise_scores import compared, scored
from hfnoise.benchmarks.golden_noise_starts import (
    Plain,
    Start,
    members,
    overhead,
    plain_runs,
    plain_start,
    refined_start,
    variations,
)
from hfnoise.benchmarks.golden_noise_tables import acceptance, document, tables, written
from hfnoise.benchmarks.guidance_runs import Subject, add_subject_options, load_subject
from hfnoise.benchmarks.reporting import circumstances, judge, print_table, write_json
from hfnoise.folders import output_folder

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"images": 20, "steps": 4, "scales": [1.0, 4.0], "seeds": 1, "pairs": 250, "training_steps": 20},
    "full": {"images": 100, "steps": 10, "scales": [1.0, 2.0, 4.0], "seeds": 3, "pairs": 2000, "training_steps": 600},
}


def run(subject: Subject, settings: argparse.Namespace) -> tuple[dict[str, Any], dict[float, dict[str, Any]]]:
    """Return what was found, and the images of the first seed by scale and start.

    Args:
        subject ([`~hfnoise.benchmarks.guidance_runs.Subject`]): who draws.
        settings (`argparse.Namespace`): the options of the command line.
    """
    checkpoint, steps, labels = settings.checkpoint, settings.steps, subject.labels(settings.images)
    nets, known, diagnosis = trained_nets(subject, settings.pairs, settings.training_steps, steps)
    for name, net in nets.items():
        known[name]["cost"] = overhead(subject, net)

    def drawn(make: Callable[[int], Start]) -> tuple[dict[str, Any], Start]:
        starts = [make(seed) for seed in range(settings.seeds)]
        return scored(starts, labels, subject, checkpoint), starts[0]

    plain: dict[Plain, Any] = {}
    refined: dict[float, dict[str, Any]] = {}
    shown: dict[float, dict[str, Any]] = {}
    for one in tqdm(plain_runs(steps, settings.scales), desc="plain runs"):
        plain[one], first = drawn(partial(plain_start, subject, labels, run=one))
        if one.steps == steps and one.scale in settings.scales:
            shown[one.scale] = {"plain": first.images}
    for scale in settings.scales:
        base, refined[scale] = Plain(steps, scale), {}
        for name, member in tqdm(members(subject, checkpoint, nets, steps, scale).items(), desc=f"CFG {scale:g}"):
            scores, first = drawn(partial(refined_start, subject, labels, run=base, member=member))
            refined[scale][name] = compared(scores, base, plain)
            shown[scale][name] = first.images
    seeds = [variations(subject, labels, seed, steps, max(settings.scales)) for seed in range(settings.seeds)]
    varied = {name: _varied([one[name] for one in seeds], labels, subject, checkpoint) for name in seeds[0]}
    found = {"plain": plain, "refined": refined, "nets": known, "variations": varied, "diagnosis": diagnosis}
    return {**found, "images": settings.seeds * len(labels)}, shown


def _varied(starts: Sequence[Start], labels: Any, subject: Subject, checkpoint: str) -> dict[str, Any]:
    """Return scores whose diversity is that within the images of one seed."""
    found = scored(starts, labels, subject, checkpoint)
    each = [scored([start], labels, subject, checkpoint)["diversity"]["mean"] for start in starts]
    found["diversity"]["mean"] = sum(each) / len(each)
    return found


def _settings(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hfnoise.benchmarks.golden_noise", description=__doc__.split("\n")[0])
    add_subject_options(parser)
    parser.add_argument("--preset", choices=list(PRESETS), default="full", help="of what is not given")
    parser.add_argument("--images", type=int, help="of each start, scale and seed")
    parser.add_argument("--steps", type=int, help="of the sampler")
    parser.add_argument("--scales", type=float, nargs="+", help="of guidance; 1 is none")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--pairs", type=int, help="that the networks are trained on")
    parser.add_argument("--training_steps", type=int, help="of each network")
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(args)
    for name, value in PRESETS[given.preset].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    given.scales = sorted(set(given.scales))
    return given


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a bound is missed.

    Args:
        args (sequence of `str`, *optional*): of the command line.
    """
    settings = _settings(args)
    subject, folder = load_subject(settings.checkpoint, settings.world), output_folder(settings.output_dir)
    subject.pipe.set_progress_bar_config(disable=True)
    found, shown = run(subject, settings)
    made = tables(found, settings.steps)
    for title, header, rows in made:
        print_table(f"{subject.name}, {settings.steps} steps: {title}", header, rows)
    print(found["diagnosis"])
    checks = acceptance(found, settings.steps)
    judged = judge(checks)
    name = f"golden_noise_{subject.stem}"
    kept = {key: getattr(settings, key) for key in ("checkpoint", *PRESETS["full"])}
    about = {**circumstances(range(settings.seeds)), "settings": kept, "processor_seconds": time.process_time(),
             "acceptance": [list(check) for check in checks]}  # fmt: skip
    write_json(folder / f"{name}.json", {**about, "results": written(found)})
    (folder / f"{name}.md").write_text(document(made, judged, found["diagnosis"]), encoding="utf-8")
    plot(found, settings.steps, folder / f"{name}.png")
    grid(shown, subject, settings.checkpoint, folder / f"golden_noise_pictures_{subject.stem}.png")
    return int(not all(passed for _, passed in checks))


if __name__ == "__main__":
    raise SystemExit(main())
