"""The matrix of pipelines: what is combined with what, which pairs are refused and how, and the table of the docs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

GUIDERS = ("none", "AdaptiveGuidance", "ProjectedGuidance", "LinearGuidance", "Adaptive + Projected")
NOISES = (
    "none", "ReDenoise", "NoiseLevelGuidance", "NPNet", "NoisePromptNet", "ConditioningNoise", "RandomSearch",
    "ZeroOrderSearch", "PathSearch", "OneMoreStep", "TerminalPrior", "BrightnessOffset", "chain", "chain of nets",
)  # fmt: skip
SEARCHES = ("RandomSearch", "ZeroOrderSearch", "PathSearch")
# Of each column the first entry is the default.
COLUMNS: dict[str, tuple[str, ...]] = {
    "guider": GUIDERS,
    "noise": NOISES,
    "denoiser": ("float", "W4A4", "W1 packed", "NF4", "compiled"),
    "adapter": ("none", "LoRA"),
    "call": ("generators", "images", "callback", "decoded", "global seed"),
    "host": ("guide", "from_pipe", "preset", "reloaded"),
}


@dataclass(frozen=True)
class Cell:
    """One entry of each column, in a family."""

    family: str
    guider: str = "none"
    noise: str = "none"
    denoiser: str = "float"
    adapter: str = "none"
    call: str = "generators"
    host: str = "guide"

    def __str__(self) -> str:
        chosen = [getattr(self, name) for name in COLUMNS if getattr(self, name) != COLUMNS[name][0]]
        return "-".join([self.family, *chosen]).replace(" ", "_")


@dataclass(frozen=True)
class Refusal:
    """Entries that do not go together: what they are, and what the error says.

    Args:
        families: `()` is all of them.
        entries: by column, those that are refused; of two columns each pair is.
        phrase: a regular expression that the error, or the warning, contains.
        warns: whether it is a warning, and the part is left out.
    """

    families: tuple[str, ...]
    entries: dict[str, tuple[str, ...]]
    phrase: str
    warns: bool = False

    def holds(self, family: str, chosen: dict[str, str]) -> bool:
        here = not self.families or family in self.families
        return here and all(chosen.get(name) in entries for name, entries in self.entries.items())

    def cells(self) -> Iterator[Cell]:
        families = self.families or ("sd-ddim",)
        for family in families:
            for first in self._entries():
                yield Cell(family, **first)

    def _entries(self) -> Iterator[dict[str, str]]:
        names = list(self.entries)
        # Each entry once: their messages differ by the name only.
        for number in range(max(len(entries) for entries in self.entries.values())):
            yield {name: self.entries[name][number % len(self.entries[name])] for name in names}


@dataclass(frozen=True)
class Family:
    """A row of the matrix.

    Args:
        title: for the table.
        without: entries that cannot be had in the tiny model, by column; they are no claim.
    """

    title: str
    without: dict[str, tuple[str, ...]] = field(default_factory=dict)


# The searches share their runs: one family has all of them. torch.compile takes ten times as long to trace a UNet as a
# transformer.
_ONE_SEARCH = {"noise": ("ZeroOrderSearch", "PathSearch")}
_UNET = {"denoiser": ("compiled",)}
FAMILIES: dict[str, Family] = {
    "sd-ddim": Family("Stable Diffusion", dict(_UNET)),
    "sdxl": Family("Stable Diffusion XL", {**_UNET, **_ONE_SEARCH}),
    "sd-img2img": Family("SD image to image", {**_UNET, **_ONE_SEARCH}),
    # With num_images_per_prompt stock itself draws other images than one by one: it encodes the picture once.
    "sd-inpaint-4": Family("SD inpainting, strength 1", {**_UNET, **_ONE_SEARCH, "call": ("images",)}),
    "sd-controlnet": Family("SD with ControlNet", {**_UNET, **_ONE_SEARCH}),
    "sd-ip-adapter": Family("SD with IP-Adapter", {**_UNET, **_ONE_SEARCH}),
    "lcm": Family("Latent consistency model", {**_UNET, **_ONE_SEARCH}),
    # Embeddings that are given to stock must be those of every image already.
    "sd3": Family("Stable Diffusion 3", {**_ONE_SEARCH, "call": ("images",)}),
    "flux": Family("Flux", dict(_ONE_SEARCH)),
    # PEFT adapters are put on it by peft itself: the class of diffusers has no add_adapter.
    "pixart-alpha": Family("PixArt", {**_ONE_SEARCH, "adapter": ("LoRA",)}),
    # No VAE in the tiny model, and another name for images.
    "wan-2.1": Family("Wan (video)", {**_ONE_SEARCH, "call": ("decoded", "images")}),
}
_ESTIMATES = ("OneMoreStep", "TerminalPrior", "BrightnessOffset", "chain")
_NETS = ("NPNet", "NoisePromptNet")
_FLOW = "does nothing in this run: .* is of flow matching"
REFUSALS: tuple[Refusal, ...] = (
    Refusal(("sd-img2img",), {"noise": NOISES[1:]}, "starts from an image with noise on it"),
    Refusal(("lcm",), {"guider": GUIDERS[1:]}, "has no unconditional prediction"),
    Refusal(
        ("lcm",),
        {"noise": ("ReDenoise", "NoiseLevelGuidance", "chain")},
        "needs predictions with and without the prompt",
    ),
    Refusal(("wan-2.1",), {"noise": (*_NETS, "chain of nets")}, "was made for another model"),
    Refusal(("wan-2.1",), {"noise": ("RandomSearch",)}, "no vae, so that there are no images to compare"),
    Refusal(("sd3", "flux"), {"noise": (*_ESTIMATES, "chain of nets")}, _FLOW, warns=True),
    Refusal(("wan-2.1",), {"noise": _ESTIMATES}, _FLOW, warns=True),
    # Put in by hand; diffusers makes them on a GPU only, and loads those again.
    Refusal((), {"denoiser": ("NF4",), "host": ("reloaded",)}, "has layers of bitsandbytes that were put in by hand"),
    Refusal((), {"adapter": ("LoRA",), "host": ("reloaded",)}, "carries adapters of PEFT"),
    Refusal(("sd-ip-adapter",), {"host": ("reloaded",)}, "carries an IP-Adapter"),
    Refusal((), {"noise": SEARCHES, "host": ("reloaded",)}, "is not saved with the pipeline", warns=True),
)


def allowed(family: str, chosen: dict[str, str]) -> bool:
    """Return whether entries of some columns go together."""
    return not any(refusal.holds(family, chosen) for refusal in REFUSALS)


def entries_of(family: str) -> dict[str, list[str]]:
    """Return what works in a family by itself, by column."""
    without = FAMILIES[family].without
    return {
        name: [entry for entry in entries if entry not in without.get(name, ()) and allowed(family, {name: entry})]
        for name, entries in COLUMNS.items()
    }


def cells_of(family: str) -> list[Cell]:
    """Return cells in which every allowed pair of entries of two columns occurs, chosen greedily, always the same."""
    entries = entries_of(family)
    missing = {
        pair: None
        for one, other in combinations(entries, 2)
        for pair in ((one, a, other, b) for a in entries[one] for b in entries[other])
        if allowed(family, {one: pair[1], other: pair[3]})
    }
    found = []
    while missing:
        one, first, other, second = next(iter(missing))
        chosen = {one: first, other: second}
        for name in entries:
            if name not in chosen:
                chosen[name] = _best(family, name, entries[name], chosen, missing)
        for pair in _pairs(chosen):
            missing.pop(pair, None)
        found.append(Cell(family, **chosen))
    return found


def _best(family: str, name: str, entries: list[str], chosen: dict[str, str], missing: Any) -> str:
    possible = [entry for entry in entries if allowed(family, {**chosen, name: entry})]
    return max(possible, key=lambda entry: sum(pair in missing for pair in _pairs({**chosen, name: entry})))


def _pairs(chosen: dict[str, str]) -> Iterator[tuple[str, str, str, str]]:
    for one, other in combinations([name for name in COLUMNS if name in chosen], 2):
        yield one, chosen[one], other, chosen[other]


# What stands beside the pairs: parts that have no column.
APART: dict[str, str] = {
    "a guider of diffusers in a classic pipeline": r"Those of diffusers work in its modular pipelines only",
    "BitsAndBytesConfig of diffusers on a CPU": "No GPU found",
    "an estimate (OneMoreStep) before a member that needs noise": "Put it last",
    "two searches in a chain": "a chain has two searches",
    "a search in a modular pipeline": "search with a classic pipeline of the same parts",
    "a guider in a call from the callback of its own guided call": "is in the middle of a guided call",
}
BEGIN, END = "<!-- combinations of pipelines -->", "<!-- end -->"
_TEXT = """\
A cell is one entry of each column; for each family cells are chosen so that every pair of entries of two columns that
is not refused occurs in one of them (`python -m pytest -m "" tests/combinations/test_pipelines.py`). In every cell:
neutral settings are the stock run to the bit, with the same denoiser; the guided run is, to the bit, the run of the
guider from the start that the initial noise made in a run of its own; the rows that the denoiser evaluated are those
of the reports; the settings, the quantisation and the adapter change the images; samples with their own generators
are what they are alone (not at W4A4, where a last bit may become a step of the grid); a callback is told the latents
of every step.

| Column | Entries |
| --- | --- |
"""


def table() -> str:
    """Return what the page of the docs says."""
    lines = [_TEXT + "\n".join(f"| {name} | {', '.join(entries)} |" for name, entries in COLUMNS.items()), ""]
    lines += ["| Family | Cells | All entries but |", "| --- | --- | --- |"]
    for name, family in FAMILIES.items():
        refused = {
            column: [entry for entry in entries if not allowed(name, {column: entry})]
            for column, entries in COLUMNS.items()
        }
        parts = [_but(entries, COLUMNS[column], column) for column, entries in refused.items() if entries]
        untried = [entry for entries in family.without.values() for entry in entries]
        tail = f"not tried: {', '.join(untried)}" if untried else ""
        lines.append(
            f"| {family.title} | {len(cells_of(name))} | {'; '.join([*parts, tail]).strip('; ') or 'nothing'} |"
        )
    lines += ["", "| Refused | Where | What it says |", "| --- | --- | --- |"]
    for refusal in REFUSALS:
        families = ", ".join(FAMILIES[name].title for name in refusal.families) or "everywhere"
        what = " with ".join(_but(list(entries), COLUMNS[name], name) for name, entries in refusal.entries.items())
        kind = "a warning: " if refusal.warns else ""
        lines.append(f"| {what} | {families} | {kind}{_shown(refusal.phrase)} |")
    lines += [f"| {what} | everywhere | {_shown(phrase)} |" for what, phrase in APART.items()]
    return "\n".join(lines)


def _but(entries: list[str], every: tuple[str, ...], column: str) -> str:
    if len(entries) > 1 and len(entries) == len(every) - 1:
        return f"any {'initial noise' if column == 'noise' else column}"
    return ", ".join(entries)


def _shown(phrase: str) -> str:
    return phrase.replace(".*", "...").replace("\\", "")


if __name__ == "__main__":
    # Writes the section of the page: python -m tests.combinations.pipelines
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs" / "combinations.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
