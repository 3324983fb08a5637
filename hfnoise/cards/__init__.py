"""Model and dataset cards: built from what a run knows, rendered strictly, the same facts in every family.

A family's file (`hf_card.py`, `*_card.py`) holds what is its own and fills [`CardFacts`]; the template `card.md` of
`hfnoise.model_cards` has the headings that all share, and a family's template the rest.
"""

from __future__ import annotations

from hfnoise.cards.arguments import CardArguments
from hfnoise.cards.facts import CardFacts, run_seeds, setting_rows
from hfnoise.cards.figures import ONE_RUN, Metric, last_metrics, number, rate, rows_of, share_text
from hfnoise.cards.origin import (
    Base,
    base_of,
    command_line,
    embedded_name,
    hub_name,
    library_versions,
    trained_base,
    versions_by_library,
)
from hfnoise.cards.rendering import check_card_text, render_card

__all__ = [
    "ONE_RUN",
    "Base",
    "CardArguments",
    "CardFacts",
    "Metric",
    "base_of",
    "check_card_text",
    "command_line",
    "embedded_name",
    "hub_name",
    "last_metrics",
    "library_versions",
    "number",
    "rate",
    "render_card",
    "rows_of",
    "run_seeds",
    "setting_rows",
    "share_text",
    "trained_base",
    "versions_by_library",
]
