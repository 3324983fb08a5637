"""The card of a part of a pipeline that is pushed alone: a guider, a network of golden noise, a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hfnoise.cards.facts import CardFacts
from hfnoise.cards.origin import Base, base_of
from hfnoise.citations import ADAPTIVE_GUIDANCE_BIBTEX, APG_BIBTEX, GOLDEN_NOISE_BIBTEX, ONE_MORE_STEP_BIBTEX

# Class -> tag on the Hub, identifier of the paper, citation. Linear estimates are of the paper of Adaptive Guidance.
COMPONENTS = {
    "AdaptiveGuidance": ("adaptive-guidance", "2312.12487", ADAPTIVE_GUIDANCE_BIBTEX),
    "LinearGuidance": ("linear-guidance", "2312.12487", ADAPTIVE_GUIDANCE_BIBTEX),
    "ProjectedGuidance": ("apg", "2410.02416", APG_BIBTEX),
    "NPNet": ("golden-noise", "2411.09502", GOLDEN_NOISE_BIBTEX),
    "NoisePromptNet": ("golden-noise", "2411.09502", GOLDEN_NOISE_BIBTEX),
    "OneMoreStep": ("one-more-step", "2311.15744", ONE_MORE_STEP_BIBTEX),
    "TimeFreeUNet2DConditionModel": ("one-more-step", "2311.15744", ONE_MORE_STEP_BIBTEX),
}
# Tag -> row of the table of methods, where they differ.
METHOD_ROWS = {"apg": "projected-guidance", "linear-guidance": "adaptive-guidance"}
_WHAT = {
    "golden-noise": "a network of golden noise: it turns noise into noise that suits the prompt better",
    "one-more-step": "a module of One More Step: it lets images be as dark and as bright as the prompt says",
}
_SNIPPETS = {
    "golden-noise": (
        "from hfnoise import GoldenNoisePipeline  # pip install hfnoise\n\n"
        'pipe = GoldenNoisePipeline.from_pretrained("YOUR-PIPELINE", npnet="{repo}")'
    ),
    "one-more-step": (
        "from hfnoise import OneMoreStep, OneMoreStepPipeline  # pip install hfnoise\n\n"
        'step = OneMoreStep.from_pretrained("{repo}")\n'
        'pipe = OneMoreStepPipeline.from_pretrained("YOUR-PIPELINE", initial_noise=step)'
    ),
}
_GUIDER_SNIPPET = (
    "from hfnoise import AutoGuidedPipeline, AutoGuider  # pip install hfnoise\n\n"
    'guider = AutoGuider.from_pretrained("{repo}")\n'
    'pipe = AutoGuidedPipeline.from_pretrained("YOUR-PIPELINE", guider=guider)'
)
_BLANK = "More Information Needed"


def replace_blank_card(component: Any, folder: str | Path, repo_id: str) -> None:
    """Put the card of a component in the place of the blank one of diffusers; one that says something stays.

    Args:
        component: a guider or network of hfnoise, with a `config`.
        folder (`str` or `Path`): that is about to be uploaded.
        repo_id (`str`): where to.
    """
    file = Path(folder) / "README.md"
    if file.is_file() and _BLANK in file.read_text(encoding="utf-8"):
        component_card(component, repo_id).save(file)


def component_card(component: Any, repo_id: str) -> ModelCard:
    """Return the card of a guider or network: its options, and how it is put into a pipeline.

    Args:
        component: a guider or network of hfnoise, with a `config`.
        repo_id (`str`): its name on the Hub.

    Example:
        >>> from hfnoise import AdaptiveGuidance
        >>> from hfnoise.cards.component import component_card
        >>> component_card(AdaptiveGuidance(threshold=0.97), "me/guider").data.to_dict()["hfnoise"]["method"]
        'adaptive-guidance'
    """
    parts = list(getattr(component, "stages", [component]))
    kinds = [getattr(part, "saved_class", type(part).__name__) for part in parts]
    methods = [COMPONENTS.get(kind, ("guidance", "", "")) for kind in kinds]
    tag = methods[0][0]
    options = {kind: _options(part) for kind, part in zip(kinds, parts, strict=True)}
    papers = dict.fromkeys(paper for _, paper, _ in methods if paper)
    sources = ", ".join(f"[paper](https://huggingface.co/papers/{paper})" for paper in papers)
    path = component.config.get("_name_or_path")
    return CardFacts(
        name=repo_id.rpartition("/")[2],
        lead=(
            f"{' with '.join(f'`{kind}`' for kind in kinds)} of hfnoise, "
            f"{_WHAT.get(tag, 'a guider for pipelines of diffusers')}{sources and f' ({sources})'}."
        ),
        method=METHOD_ROWS.get(tag, tag),
        base=base_of(path) if path else Base("none: it is a part that pipelines take", "none"),
        library_name="diffusers",
        tags=["diffusers", "hfnoise", *(one for one, _, _ in methods)],
        block={"options": options},
        noise=[(f"{kind}, `{name}`", str(value)) for kind, one in options.items() for name, value in one.items()],
        noise_note="Options that are not set, and lists, are in its configuration only.",
        seeds=[("seed", "none is known: it was pushed by itself, not by the Trainer or command that made it")],
        snippet=_SNIPPETS.get(tag, _GUIDER_SNIPPET).format(repo=repo_id),
        citation="\n\n".join(dict.fromkeys(citation.strip() for _, _, citation in methods if citation)),
    ).render("component.md")


def _options(part: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in part.config.items()
        if not name.startswith("_") and isinstance(value, (bool, int, float, str))
    }
