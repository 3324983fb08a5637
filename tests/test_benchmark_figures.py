"""The figures that are shipped agree with each other, and leave no rival out that was run."""

from __future__ import annotations

import json
from pathlib import Path

from hfnoise.benchmarks.published import published

DOCS = Path(__file__).parent.parent / "docs"


def test_a_ratio_is_that_of_the_figures_beside_it():
    compared = 0
    for name, found in published().items():
        for one in found.comparisons:
            (ours, *unit), (theirs, *other) = one.ours.replace(",", "").split(), one.theirs.replace(",", "").split()
            if unit != other or "%" in one.ours and "%" not in one.theirs:
                continue
            # Figures are shown rounded, by half a unit of their last digit; medians of ratios are near those of times.
            mine, other_one = (float(text) for text in (ours, theirs))
            slack = sum(
                0.5 * 10.0 ** -len(text.partition(".")[2]) / float(text) for text in (ours, theirs) if "e" not in text
            )
            assert abs(mine / other_one / one.ratio.value - 1) <= 0.06 + slack, (name, one)
            compared += 1
    assert compared > 100


def test_every_other_federated_method_that_was_run_is_compared_with():
    runs = json.loads((DOCS / "results" / "fedsvd.json").read_text(encoding="utf-8"))["results"]
    others = {name for name in runs if not name.startswith("FedSVD") and not name.endswith("AdamW")}
    wrong = [one for one in published()["fedsvd"].comparisons if one.quantity.startswith("wrong answers")]
    assert {one.against for one in wrong} == others and "FedEx-LoRA" in others
