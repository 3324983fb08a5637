"""Tables and bounds of the golden noise benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hfnoise.benchmarks.golden_noise_nets import OFFICIAL, OURS, parameters_for_sdxl
from hfnoise.benchmarks.golden_noise_scores import no_worse_plain, search_bound, share_interval
from hfnoise.benchmarks.golden_noise_starts import BEST_OF, GOLDEN, Plain, branches
from hfnoise.benchmarks.reporting import markdown

# Points of judge accuracy that golden noise must gain without guidance.
LEAST_GAIN = 0.10
# Of the share of the golden change that NoisePromptNet explains, over the official shape.
LEAST_MORE_EXPLAINED = 0.1
# Times the parameters of the official shape in miniature; share of those for SDXL.
MOST_PARAMETERS, MOST_PARAMETERS_SDXL = 3, 0.1
Table = tuple[str, list[str], list[list[str]]]


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(ends: tuple[float, float]) -> str:
    return "–".join(_share(end) for end in ends)


def _with_error(found: dict[str, Any], digits: int = 2) -> str:
    return f"{found['mean']:.{digits}f}" + ("" if found["error"] is None else f" ± {found['error']:.{digits}f}")


def _wins(rate: dict[str, float]) -> str:
    return f"{_share(rate['mean'])} ({_interval((rate['low'], rate['high']))})"


def _row(found: dict[str, Any]) -> list[str]:
    accuracy = f"{_share(found['judge_accuracy']['mean'])} ({_interval(found['accuracy_interval'])})"
    scores = [accuracy, *[_with_error(found[name]) for name in ("frechet_distance", "diversity")]]
    return [f"{found['evaluations']:.0f}", *scores, f"{1000 * found['seconds_per_image']:.1f}"]


_SCORES = ["evaluations", "judge, %", "Fréchet distance", "diversity", "ms an image"]


def tables(found: dict[str, Any], steps: int) -> list[Table]:
    """Return title, header and rows of all tables.

    Args:
        found (`dict`): of [`~hfnoise.benchmarks.golden_noise.run`].
        steps (`int`): of the sampler.
    """
    made = []
    for scale, refined in found["refined"].items():
        base = found["plain"][Plain(steps, scale)]
        made += [_refined(scale, refined, base), _at_equal_cost(scale, refined, found["plain"])]
    made += [_plain(found["plain"]), _searches(found, steps), _nets(found["nets"])]
    return [*made, _variations(found["variations"], max(found["refined"]))]


def _refined(scale: float, refined: dict[str, Any], base: dict[str, Any]) -> Table:
    rows = [["plain", *_row(base), ""]]
    rows += [[name, *_row(one), _wins(one["wins_over_plain"])] for name, one in refined.items()]
    return f"Refined starts at CFG {scale:g}", ["start", *_SCORES, "wins over plain, %"], rows


def _at_equal_cost(scale: float, refined: dict[str, Any], plain: dict[Plain, Any]) -> Table:
    header = ["start", "evaluations", "judge, %", "Fréchet distance", "plain run no worse in both", "its scores"]
    header += [
        "most accurate plain run",
        "its scores",
        "wins over it, %",
        "plain run nearest to real images",
        "its scores",
    ]
    rows = []
    for name, one in refined.items():
        cells = [name, f"{one['evaluations']:.0f}", *_pair(one)]
        no_worse = no_worse_plain(one, plain)
        cells += ["none", ""] if no_worse is None else [str(no_worse), ", ".join(_pair(plain[no_worse]))]
        rival, nearest = one["most_accurate_plain"], one["nearest_plain"]
        cells += [str(rival), ", ".join(_pair(plain[rival])), _wins(one["wins_over_most_accurate_plain"])]
        rows.append([*cells, str(nearest), ", ".join(_pair(plain[nearest]))])
    return f"The same, and the best of all plain runs of no more evaluations (CFG {scale:g})", header, rows


def _pair(found: dict[str, Any]) -> list[str]:
    return [_share(found["judge_accuracy"]["mean"]), f"{found['frechet_distance']['mean']:.2f}"]


def _plain(plain: dict[Plain, Any]) -> Table:
    return "Plain runs", ["run", *_SCORES], [[str(run), *_row(one)] for run, one in plain.items()]


def _searches(found: dict[str, Any], steps: int) -> Table:
    header = ["CFG", "search", "verifier, %", "judge, %", "1 - (1 - p)^N, %"]
    rows = []
    for scale, refined in found["refined"].items():
        accuracy = found["plain"][Plain(steps, scale)]["judge_accuracy"]["mean"]
        for count, name in BEST_OF.items():
            shares = [refined[name][kind]["mean"] for kind in ("verifier_accuracy", "judge_accuracy")]
            rows.append([f"{scale:g}", name, *map(_share, [*shares, search_bound(accuracy, count)])])
    return "Best of N, by the verifier that chose and by the judge, and a verifier without errors", header, rows


def _nets(nets: dict[str, dict[str, float]]) -> Table:
    header = ["network", "parameters", "R² of the change", "seconds of training", "evaluations of the UNet it takes"]
    rows = [
        [name, f"{one['parameters']:.0f}", f"{one['r2']:.3f}", f"{one['training_seconds']:.1f}", f"{one['cost']:.2f}"]
        for name, one in nets.items()
    ]
    return "Networks trained on the same pairs", header, rows


def _variations(varied: dict[str, Any], scale: float) -> Table:
    header = ["images of a prompt", "diversity", "gained over one seed", "judge, %", "lost, points"]
    one, every = varied["one seed"], varied["independent seeds"]
    rows = []
    for name, found in varied.items():
        gained = found["diversity"]["mean"] - one["diversity"]["mean"]
        lost = every["judge_accuracy"]["mean"] - found["judge_accuracy"]["mean"]
        values = [f"{found['diversity']['mean']:.2f}", f"{gained:.2f}", _share(found["judge_accuracy"]["mean"])]
        rows.append([name, *values, f"{100 * lost + 0.0:.1f}"])
    return f"Variations of one image a prompt at CFG {scale:g}", header, rows


def acceptance(found: dict[str, Any], steps: int) -> list[tuple[str, bool]]:
    """Return statements, and whether they hold; those on golden noise where there was a run without guidance.

    Args:
        found (`dict`): of [`~hfnoise.benchmarks.golden_noise.run`].
        steps (`int`): of the sampler.
    """
    checks = _golden(found["refined"][1.0], found["plain"][Plain(steps, 1.0)]) if 1.0 in found["refined"] else []
    official, ours = found["nets"][OFFICIAL], found["nets"][OURS]
    more, times = ours["r2"] - official["r2"], ours["parameters"] / official["parameters"]
    whole, small = parameters_for_sdxl()
    checks += [
        (
            f"{OURS} explains {more:.3f} more of the golden change than {OFFICIAL}, at least {LEAST_MORE_EXPLAINED}",
            more >= LEAST_MORE_EXPLAINED,
        ),
        (f"with {times:.2f} times its parameters, at most {MOST_PARAMETERS}", times <= MOST_PARAMETERS),
        (
            f"and for SDXL with {small / whole:.3f} of those of NPNet, at most {MOST_PARAMETERS_SDXL}",
            small <= MOST_PARAMETERS_SDXL * whole,
        ),
        (f"{OURS} takes {ours['cost']:.2f} evaluations of the UNet, at most 1", ours["cost"] <= 1),
    ]
    return checks + _bounds(found, steps)


def _golden(refined: dict[str, Any], plain: dict[str, Any]) -> list[tuple[str, bool]]:
    checks = []
    for name in (GOLDEN, OURS):
        gain = refined[name]["judge_accuracy"]["mean"] - plain["judge_accuracy"]["mean"]
        distances = tuple(one["frechet_distance"]["mean"] for one in (refined[name], plain))
        checks += [
            (
                f"{name} gains {100 * gain:.1f} points of accuracy at CFG 1, at least {100 * LEAST_GAIN:.0f}",
                gain >= LEAST_GAIN,
            ),
            ("with a Fréchet distance of {:.2f}, not above {:.2f}".format(*distances), distances[0] <= distances[1]),
        ]
    return checks


def _bounds(found: dict[str, Any], steps: int) -> list[tuple[str, bool]]:
    checks = []
    for scale, refined in found["refined"].items():
        accuracy = found["plain"][Plain(steps, scale)]["judge_accuracy"]["mean"]
        for count, name in BEST_OF.items():
            share, spent = refined[name]["judge_accuracy"]["mean"], refined[name]["evaluations"]
            bound = search_bound(accuracy, count)
            # All may be right by chance where the bound is just below 1.
            low = share_interval(share, found["images"])[0]
            checks += [
                (
                    f"{name} at CFG {scale:g} is right in {_share(share)} %, not certainly above {_share(bound)} %",
                    low <= bound,
                ),
                (f"and spends its budget, {spent:.0f} evaluations", spent == count * steps * branches(scale)),
            ]
    return checks


def document(made: list[Table], judged: str, diagnosis: str) -> str:
    """Return all tables in Markdown, what the pairs hold, and which bounds are met."""
    parts = [f"## {title}\n\n{markdown(header, rows)}" for title, header, rows in made]
    return "\n".join([*parts, f"The pairs: {diagnosis}.\n", judged])


def written(found: dict[str, Any], keep: Callable[[str], bool] = lambda name: name != "log_probability") -> Any:
    """Return what was found as JSON has it: names as text, without the numbers of single images."""
    if isinstance(found, dict):
        return {str(name): written(one, keep) for name, one in found.items() if keep(str(name))}
    return str(found) if isinstance(found, Plain) else found
