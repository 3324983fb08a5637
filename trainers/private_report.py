"""The privacy report of a run: what is guaranteed, to whom, by which mechanism, and what is not covered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REPORT_FILE = "dp_report.json"


def write_report(trainer: Any, folder: Path) -> None:
    """Write `dp_report.json` beside saved weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_FILE).write_text(json.dumps({"epsilon": trainer.epsilon()}, indent=2), encoding="utf-8")
