"""The tables of docs/combinations.md, written from the data of the tests.

`python -m tests.combinations.page` writes the table of the Trainers into the page.
"""

from __future__ import annotations

from pathlib import Path

from tests.combinations.trainer_rows import ROWS
from tests.combinations.trainers import ABSENT, COLUMNS, Refused, cells

PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
TRAINERS = "<!-- combinations of trainers -->"
END = "<!-- end -->"
WORDS = {
    "same": "same", "learns": "learns", "has effect": "works", "close": "close", "units": "units", "resumed": "same",
    "processes": "same", "average": "works", ABSENT: "·",
}  # fmt: skip
MEANING = (
    "**same**: losses of every step and trained weights are those without the setting, up to the order of sums "
    "(private Trainers: weights; resumed runs: to the bit).\n"
    "**learns**: the loss falls, all trained weights move, no others.\n"
    "**close**: bf16 losses within 10 % of float32.\n"
    "**units**: the gradients of units from one backward pass train as those of one unit at a time do.\n"
    "**works**: the setting reaches the loss, or the average is what is evaluated.\n"
    "**—**: refused, in the words below. **·**: the row's arguments have no such setting."
)


def trainer_table() -> str:
    """Return the table of the Trainers, what its words mean, and every refusal."""
    expected = {(cell.row, cell.column): cell.expected for cell in cells()}
    lines = ["| | " + " | ".join(ROWS) + " |", "| --- " * (len(ROWS) + 1) + "|"]
    for name, column in COLUMNS.items():
        found = [expected[row, name] for row in ROWS]
        shown = ["—" if isinstance(one, Refused) else WORDS[one] for one in found]
        lines.append(f"| {column.title} | " + " | ".join(shown) + " |")
    refusals: dict[tuple[str, Refused], list[str]] = {}
    for (row, name), one in expected.items():
        if isinstance(one, Refused):
            refusals.setdefault((name, one), []).append(row)
    said = [
        f'- {COLUMNS[name].title}: {", ".join(rows)}: "{one.words}"' + (f" ({one.by})" if one.by else "")
        for (name, one), rows in refusals.items()
    ]
    return "\n".join([*lines, "", MEANING, "", "Refused:", "", *said])


def with_table(page: str, marker: str, table: str) -> str:
    """Return the page with what stands between a marker and the next end replaced."""
    before, _, rest = page.partition(marker)
    _, _, after = rest.partition(END)
    return f"{before}{marker}\n{table}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), TRAINERS, trainer_table()), encoding="utf-8")
