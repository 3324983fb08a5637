"""The card of a guided pipeline: guider and initial noise with all options, what the last run saved, how to load."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from hfnoise.cards import Base, CardFacts, base_of
from hfnoise.cards.component import COMPONENTS, METHOD_ROWS
from hfnoise.pipelines.guidance_report import GuidanceReport
from hfnoise.pipelines.guider_base import UpdateGuidance
from hfnoise.pipelines.initial_noise import InitialNoise
from hfnoise.pipelines.initial_noise_files import INITIAL_NOISES, NOISE_FOLDER, saved_members
from hfnoise.pipelines.saved_parts import GUIDER_FOLDER

# Of the two slots, in the first sentence.
_VERBS = ("guided by", "started by")
# What goes before our section in a card that had no other author.
_LEAD = re.compile(
    r"^.*(?: by .+ of hfnoise\.|, pushed by hfnoise as it is\.)\n\n(?=<!-- hfnoise:guidance -->)", re.MULTILINE
)
_SECTION = re.compile(r"<!-- hfnoise:guidance -->.*?<!-- /hfnoise:guidance -->\n?", re.DOTALL)


def pipeline_card(pipe: Any, repo_id: str, token: str | None = None) -> ModelCard:
    """Return the card to push: what is on the Hub already, with our section in it; a new one if nothing is.

    Args:
        pipe: a guided pipeline.
        repo_id (`str`): where it goes.
        token (`str`, *optional*): of the Hub.
    """
    has_part = isinstance(pipe.guider, UpdateGuidance) or saved_members(pipe.initial_noise)
    ours = guidance_card(pipe, repo_id)
    try:
        existing = ModelCard.load(repo_id, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return ours
    section = _SECTION.search(ours.text).group()  # type: ignore[union-attr]
    text = existing.text
    if _LEAD.search(text):  # a card that was ours from the beginning
        lead = _LEAD.search(ours.text).group()  # type: ignore[union-attr]
        text = _SECTION.sub(lambda _: section, _LEAD.sub(lambda _: lead, text, count=1))
    elif _SECTION.search(text):
        text = _SECTION.sub(lambda _: section if has_part else "", text)
    elif has_part:
        text = f"{text.rstrip()}\n\n{section}"
    existing.text = text
    tags = {tag for tag, _, _ in COMPONENTS.values()} | {"hfnoise"}
    kept = [tag for tag in existing.data.tags or [] if tag not in tags]
    existing.data.tags = [*kept, *(tag for tag in (ours.data.tags or [] if has_part else []) if tag not in kept)]
    existing.data.library_name = "diffusers"
    existing.data.hfnoise = ours.data.hfnoise if has_part else None  # nothing is written where there is None
    return existing


def guidance_card(pipe: Any, repo_id: str) -> ModelCard:
    """Return a new card of a guided pipeline with a guider of ours, or an initial noise that is saved.

    Args:
        pipe: the pipeline.
        repo_id (`str`): its name on the Hub, as it is loaded from there.
    """
    stages = pipe.guider.stages if isinstance(pipe.guider, UpdateGuidance) else []
    noises = saved_members(pipe.initial_noise)
    parts = {"guider": _names(stages), "initial_noise": _names(noises)}
    methods = [COMPONENTS[name] for names in parts.values() for name in names if name in COMPONENTS]
    base, stock = base_of(pipe.config.get("_name_or_path")), type(pipe).__name__.removeprefix("Guided")
    # What is pushed where it came from is no base of itself.
    base = Base(f"this repository's own `{stock}`", "that of this repository") if base.hub_id == repo_id else base
    start = base.name if base.hub_id else f"A `{stock}`"
    done = [f"{verb} {_papers(names)}" for verb, names in zip(_VERBS, parts.values(), strict=True) if names]
    folders = {f"`{GUIDER_FOLDER}/`": bool(stages), **_noise_folders(noises)}
    where = " and ".join(folder for folder, is_there in folders.items() if is_there)
    library, loader = ("hfnoise", "AutoGuidedPipeline") if done else ("diffusers", "DiffusionPipeline")
    report = _last_run(pipe.guider) if stages else None
    evaluations = {} if report is None else {"evaluations": report.evaluations, "saved": round(report.saved, 4)}
    tags = dict.fromkeys(tag for tag, _, _ in methods)
    return CardFacts(
        name=repo_id.rpartition("/")[2],
        lead=f"{start} {' and '.join(done)} of hfnoise." if done else f"{start}, pushed by hfnoise as it is.",
        method=METHOD_ROWS.get(next(iter(tags), ""), next(iter(tags), "initial-noise" if done else "none")),
        base=base,
        library_name="diffusers",
        tags=["diffusers", "hfnoise", *tags],
        block={**{name: names for name, names in parts.items() if names}, **evaluations},
        noise=[row[1:] for stage in stages for row in _option_rows(stage)]
        + [row[1:] for noise in noises for row in _noise_rows(noise)]
        or [("options", "there are none")],
        noise_note=(
            f"The last run before this was pushed: {report}."
            if report is not None
            else "Nothing was counted: no run with a guider came before this was pushed."
        ),
        seeds=[("seed", "none: nothing was trained. The noise of a call is that of its `generator`")],
        snippet=(
            f"from {library} import {loader}{'  # pip install hfnoise' if done else ''}\n\n"
            f'pipe = {loader}.from_pretrained("{repo_id}")'
        ),
        use_note=(
            f"diffusers alone loads this repository as its `{stock}`, with its own guidance and noise: what is in "
            f"{where} only hfnoise reads."
            if done
            else "It has neither a guider nor an initial noise of hfnoise, and diffusers loads all of it."
        ),
        citation="\n\n".join(dict.fromkeys(citation.strip() for _, _, citation in methods)),
    ).render(
        "guidance.md",
        option_rows=[row for stage in stages for row in _option_rows(stage)],
        noise_rows=[row for noise in noises for row in _noise_rows(noise)],
    )


def _names(parts: Any) -> list[str]:
    return [type(part).__name__ for part in parts]


def _papers(names: list[str]) -> str:
    return ", ".join(
        f"{name} ([paper](https://huggingface.co/papers/{COMPONENTS[name][1]}))" if name in COMPONENTS else name
        for name in names
    )


def _noise_folders(noises: list[InitialNoise]) -> dict[str, bool]:
    own = [INITIAL_NOISES[name] for name in _names(noises)]
    return {
        f"`{NOISE_FOLDER}/`": len(own) > 1 or None in own,
        **{f"`{folder}/`": True for folder in own if folder is not None},
    }


def _noise_rows(noise: InitialNoise) -> list[tuple[str, str, str]]:
    name = type(noise).__name__
    folder = INITIAL_NOISES[name] or NOISE_FOLDER

    def shown(value: Any) -> str:
        if isinstance(value, dict):  # numbers by the dozen
            return f"in `{folder}/`"
        return "default" if value is None else str(value)

    return [(name, option, shown(value)) for option, value in (noise.to_config() or {}).items()]


def _option_rows(guider: UpdateGuidance) -> list[tuple[str, str, str]]:
    options = {name: value for name, value in guider.config.items() if not name.startswith("_") and name != "inner"}
    if guider.config.get("guidance_scale") is None:
        options["guidance_scale"] = "of the call"
    if options.get("coefficients") is not None:
        options["coefficients"] = "in the guider's file"
    return [(type(guider).__name__, name, "none" if value is None else str(value)) for name, value in options.items()]


def _last_run(guider: UpdateGuidance) -> GuidanceReport | None:
    try:
        return guider.report
    except ValueError:  # no run
        return None
