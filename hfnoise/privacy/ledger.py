import json
import pathlib
from dataclasses import asdict, dataclass

from hfnoise.privacy.accounting import Mechanism


@dataclass(frozen=True)
class LedgerEntry:
    run_id: str
    sample_rate: float
    noise_multiplier: float
    bands: int
    unit: str
    first_step: int
    steps: int
    started: str
    secret: str


class Ledger:
    def __init__(self, path, fingerprint):
        self.path = pathlib.Path(path)
        self.e = {}
        if self.path.exists():
            self.e = {k: LedgerEntry(**v) for k, v in json.loads(self.path.read_text()).items()}

    def charge(self, e):
        old = self.e.get(e.run_id)
        if old is None or e.steps > old.steps:
            self.e[e.run_id] = e
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({k: asdict(v) for k, v in self.e.items()}))

    def mechanisms(self, without=None):
        return [
            Mechanism(e.sample_rate, e.noise_multiplier, e.steps, e.bands) for k, e in self.e.items() if k != without
        ]
