"""The ledger: nothing lost, nothing half written, nothing forgotten in silence."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from hfnoise.privacy.accounting import Mechanism, composed_epsilon
from hfnoise.privacy.ledger import Ledger, LedgerEntry, LedgerError

ENTRY = LedgerEntry(
    "first", 0.05, 4.0, 100, unit="author", first_step=3, started="2026-01-02T03:04:05+00:00", secret="os.urandom"
)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "folder" / "ledger.json", "sha256:one")


def test_what_was_charged_is_there(ledger):
    assert ledger.entries() == [] and ledger.epsilon(1e-5) == 0.0
    other = LedgerEntry("second", 0.1, 5.0, 7, bands=2)
    ledger.charge(ENTRY)
    ledger.charge(other)
    assert Ledger(str(ledger.path), "sha256:one").entries() == [ENTRY, other]
    assert ledger.mechanisms() == [Mechanism(0.05, 4.0, 100), Mechanism(0.1, 5.0, 7, bands=2)]
    assert ledger.mechanisms(without="first") == [Mechanism(0.1, 5.0, 7, bands=2)]
    assert ledger.epsilon(1e-5, "rdp") == composed_epsilon(ledger.mechanisms(), 1e-5, "rdp") > 0


def test_datasets_do_not_mix(ledger):
    ledger.charge(ENTRY)
    other = Ledger(ledger.path, 'of "another" dataset')
    assert other.entries() == []
    other.charge(replace(ENTRY, steps=5))
    assert [ledger.entries(), other.entries()] == [[ENTRY], [replace(ENTRY, steps=5)]]


@pytest.mark.parametrize(("steps", "kept"), [(150, 150), (100, 100), (40, 100)])
def test_a_run_keeps_its_largest_number_of_steps(ledger, steps, kept):
    ledger.charge(ENTRY)
    ledger.charge(replace(ENTRY, steps=steps))
    assert ledger.entries() == [replace(ENTRY, steps=kept)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_multiplier", 5.0),
        ("sample_rate", 0.06),
        ("bands", 2),
        ("unit", "row"),
        ("first_step", 0),
        ("secret", "x"),
    ],
)
@pytest.mark.parametrize("steps", [50, 150])
def test_a_run_cannot_change_what_it_was_charged_with(ledger, field, value, steps):
    ledger.charge(ENTRY)
    with pytest.raises(ValueError, match=rf"run 'first' was charged with another {field} \(.* now\); one entry"):
        ledger.charge(replace(ENTRY, steps=steps, **{field: value}))
    assert ledger.entries() == [ENTRY]


def test_only_the_owner_can_read_it_and_nothing_else_is_left(ledger):
    ledger.charge(ENTRY)
    ledger.charge(replace(ENTRY, steps=101))
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600
    assert sorted(path.name for path in ledger.path.parent.iterdir()) == ["ledger.json", "ledger.json.lock"]


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no ledger": lambda text: "[]",
    "other format": lambda text: text.replace("privacy ledger", "shopping list"),
    "newer": lambda text: text.replace('"version": 1', '"version": 2'),
    "unknown field": lambda text: text.replace('"steps"', '"stops"'),
    "no mechanism": lambda text: text.replace('"sample_rate": 0.05', '"sample_rate": 5'),
    "no list": lambda text: json.dumps(json.loads(text) | {"datasets": {"sha256:one": 3}}),
    "no mapping": lambda text: json.dumps(json.loads(text) | {"datasets": []}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_an_error_and_stays_as_it_is(ledger, damage):
    ledger.charge(ENTRY)
    damaged = DAMAGES[damage](ledger.path.read_text())
    ledger.path.write_text(damaged)
    for call in (ledger.entries, lambda: ledger.charge(ENTRY), lambda: ledger.epsilon(1e-5)):
        with pytest.raises(LedgerError, match="ledger.json' cannot be read .* no epsilon can be stated"):
            call()
    assert ledger.path.read_text() == damaged


def test_bytes_that_are_no_text(ledger):
    ledger.charge(ENTRY)
    ledger.path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(LedgerError, match="cannot be read"):
        ledger.entries()


def test_a_failed_write_leaves_the_old_file(ledger, monkeypatch):
    ledger.charge(ENTRY)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        ledger.charge(replace(ENTRY, steps=101))
    assert ledger.entries() == [ENTRY]
    assert not list(ledger.path.parent.glob("*.new"))


@pytest.mark.parametrize(
    "change", [{"run_id": ""}, {"unit": ""}, {"first_step": -1}, {"steps": -1}, {"sample_rate": 0.0}, {"secret": None}]
)
def test_bad_entries(change):
    with pytest.raises((ValueError, TypeError)):
        replace(ENTRY, **change)


def test_a_ledger_needs_a_dataset(tmp_path):
    with pytest.raises(ValueError, match="fingerprint='' names no dataset"):
        Ledger(tmp_path / "ledger.json", "")


def test_without_locks_there_is_no_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr("hfnoise.privacy.ledger.fcntl", None)
    with pytest.raises(LedgerError, match=r"has no flock .* Linux subsystem of Windows"):
        Ledger(tmp_path / "ledger.json", "sha256:one")


def test_a_word_of_earlier_versions(ledger):
    """They called a row an example where nothing else was said; such a run can go on."""
    ledger.charge(LedgerEntry("old", 0.05, 4.0, 5))
    ledger.path.write_text(ledger.path.read_text().replace('"row"', '"example"'))
    assert ledger.entries() == [LedgerEntry("old", 0.05, 4.0, 5, unit="row")]
    ledger.charge(LedgerEntry("old", 0.05, 4.0, 6, unit="row"))
    assert [entry.steps for entry in ledger.entries()] == [6]


CHARGES = 20
CHARGE_MANY = f"""
import sys
from hfnoise.privacy.ledger import Ledger, LedgerEntry
path, name = sys.argv[1:]
ledger = Ledger(path, "shared")
print("ready", flush=True)
sys.stdin.readline()
for step in range({CHARGES}):
    ledger.charge(LedgerEntry(name, 0.05, 4.0, step + 1))
    ledger.charge(LedgerEntry(f"{{name}}-{{step}}", 0.05, 4.0, 1))
"""


def start(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_at_once_lose_nothing(tmp_path):
    path = tmp_path / "ledger.json"
    processes = [start(CHARGE_MANY, path, name) for name in ("one", "two")]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    entries = {entry.run_id: entry.steps for entry in Ledger(path, "shared").entries()}
    single = {f"{name}-{step}": 1 for name in ("one", "two") for step in range(CHARGES)}
    assert entries == {"one": CHARGES, "two": CHARGES} | single


HANG_BEFORE_THE_RENAME = """
import os, sys, time
from hfnoise.privacy.ledger import Ledger, LedgerEntry
def hang(*_):
    print("ready", flush=True)
    time.sleep(60)
os.replace = hang
Ledger(sys.argv[1], "shared").charge(LedgerEntry("killed", 0.05, 4.0, 1))
"""


def test_killed_between_write_and_rename(tmp_path):
    ledger = Ledger(tmp_path / "ledger.json", "shared")
    ledger.charge(ENTRY)
    process = start(HANG_BEFORE_THE_RENAME, ledger.path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(tmp_path.glob("*.new"))) == 1  # it was killed where it should be
    assert ledger.entries() == [ENTRY]
    ledger.charge(replace(ENTRY, steps=101))  # the lock went with the process
    assert ledger.entries() == [replace(ENTRY, steps=101)]


def test_a_charge_is_quick_besides_the_disk(ledger, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for run in range(20):
        ledger.charge(replace(ENTRY, run_id=str(run)))
    # Processor time, of which the system's own calls are half: other processes on the machine do not count.
    start = time.process_time()
    for step in range(50):
        ledger.charge(replace(ENTRY, run_id="0", steps=101 + step))
    assert (time.process_time() - start) / 50 < 2e-3  # 0.4 ms were measured
