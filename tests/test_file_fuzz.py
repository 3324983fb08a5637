"""Files that somebody else has damaged or made up: a clear error, nothing overwritten, nothing half-loaded."""

import copy
import json
import random
import re

import pytest
import torch
from safetensors.torch import save_file

from hfnoise.errors import UsageError
from hfnoise.guidance import EstimateKey, LinearCoefficients
from hfnoise.privacy.ledger import Ledger, LedgerEntry, LedgerError

# What Python says of a wrong type or a missing entry.
BARE = re.compile(r"'[^']*'$|list ind|string ind|'\w+' object|can only|unsupported operand|.*not supported between")
CLEAR = (ValueError, TypeError, OSError, LedgerError, UsageError)
STRANGE = [None, True, -1, 0, 2**70, 1.5, "", "x", "../../x", [], [[]], {}, {"a": 1}, [None] * 3, "\0", "3"]
RAW = {
    "empty": b"", "null": b"null", "list": b"[]", "text": b'"x"', "number": b"3", "open": b"{",
    "binary": bytes(range(256)),
    "UTF-16": '{"a": 1}'.encode("utf-16"), "deep list": b"[" * 100_000, "deep": b'{"a":' * 2000 + b"1" + b"}" * 2000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}", "key twice": b'{"a": 1, "a": 2}',
}  # fmt: skip


def ledger_case(folder):
    file = folder / "ledger.json"
    Ledger(file, "data").charge(LedgerEntry("run", 0.1, 1.0, 5, started="now", secret="name"))
    return file, Ledger(file, "data").entries


def run_state_case(folder):
    from hfnoise.trainers.private_run import RunState

    state = RunState("run", "name", "data", 100, "row", 10, 1.0, 1e-5, 3.0, 1.0, "flat", "gaussian", 1, "pld", 1, 0, 9)
    state.write(folder, 4)
    return folder / "dp_state.json", lambda: RunState.read(folder).lineage(4)


def client_case(folder):
    from hfnoise.trainers import federated_client

    file = folder / "client.json"
    federated_client._write(file, federated_client.ClientRecord([0, 2], 1.0))
    return file, lambda: federated_client._read(file)


def coefficients_case(folder):
    file = folder / "coefficients.json"
    LinearCoefficients(EstimateKey("unet", "DDIMScheduler", 2, 7.5, "00"), ((0.0, 0.0), (0.1, 0.2)), 1e-3).save(file)
    return file, lambda: LinearCoefficients.load(file)


def report_case(folder):
    from hfnoise.pipelines.guidance_report import GuidanceReport

    file = folder / "report.json"
    GuidanceReport(torch.tensor([[0.5, 0.2], [0.4, 0.1]]), (None, 1), (4, 2), 2).save(file)
    return file, lambda: GuidanceReport.load(file)


def trace_case(folder):
    from hfnoise.pipelines.search_trace import SearchTrace

    trace = SearchTrace(
        "random", (4, 2, 2), (7,), ((-1, -1),), (0.0, 0.0), {"clip": ((0.1, 0.3),)}, ((0.1, 0.3),), None, (1,),
        budget=8, evaluations=8,
    )  # fmt: skip
    file = folder / "trace.json"
    file.write_text(trace.to_json())
    return file, lambda: SearchTrace.from_json(file.read_text(encoding="utf-8", errors="replace"))


def noise_case(folder):
    from hfnoise.pipelines import BrightnessOffset, SeedVariation
    from hfnoise.pipelines.initial_noise_files import read_initial_noise, save_initial_noise
    from hfnoise.pipelines.noise_chain import InitialNoiseChain

    noise = InitialNoiseChain([SeedVariation(0.1, seed=3), BrightnessOffset(0.5, direction=(0.1, 0.2))])
    save_initial_noise(noise, str(folder), {})
    file = folder / "initial_noise" / "initial_noise_config.json"
    return file, lambda: read_initial_noise(str(file), str(file), lambda name: pytest.fail("no weights are listed"))


def guider_case(folder):
    from hfnoise.pipelines import AdaptiveGuidance, ProjectedGuidance
    from hfnoise.pipelines.saved_parts import PipelineRepository

    AdaptiveGuidance(threshold=0.9995, inner=ProjectedGuidance(eta=0.5)).save_pretrained(folder / "guider")
    repository = PipelineRepository(str(folder), {}, {})
    return folder / "guider" / "guider_config.json", repository.guider


def trainer_state_case(folder):
    from hfnoise.trainers.checkpoints import check_identity

    content = {"global_step": 2, "stateful_callbacks": {"NoiseRunState": {"args": {"identity": {"loss": "sym"}}}}}
    file = folder / "trainer_state.json"
    file.write_text(json.dumps(content))
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, folder / name)
    return file, lambda: check_identity(str(folder), {"loss": "sym"})


def pairs_case(folder):
    from hfnoise.pipelines import noise_pairs

    (folder / "pairs").mkdir()
    noise_pairs._begin(folder / "pairs", {"seed": 3, "call": {"steps": 4}})
    file = folder / "pairs" / noise_pairs.SETTINGS_FILE
    return file, lambda: noise_pairs._begin(folder / "pairs", {"seed": 3, "call": {"steps": 4}})


def quest_case(folder):
    from hfnoise import QuestConfig
    from hfnoise.latents.hf_checkpoints import read_json

    file = folder / "quest.json"
    QuestConfig(bits=2).to_json_file(file)
    return file, lambda: QuestConfig.from_dict(read_json(folder, "quest.json"))


CASES = {
    "ledger": ledger_case, "private run": run_state_case, "client": client_case, "coefficients": coefficients_case,
    "report": report_case, "trace": trace_case, "initial noise": noise_case, "guider": guider_case,
    "trainer state": trainer_state_case, "pairs": pairs_case, "quest": quest_case,
}  # fmt: skip


def places(content, path=()):
    """Yield the way to every entry of a JSON content."""
    yield path
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in entries:
        yield from places(value, (*path, name))


def changed(content, source):
    """Return a JSON content with one entry replaced, removed, added or turned into NaN."""
    content = copy.deepcopy(content)
    way = source.choice([path for path in places(content) if path])
    holder = content
    for name in way[:-1]:
        holder = holder[name]
    kind = source.randrange(5)
    if kind == 0:
        del holder[way[-1]]
    elif kind == 1 and isinstance(holder, dict):
        holder[source.choice(["extra", "__class__", "_class_name", "../x"])] = source.choice(STRANGE)
    elif kind == 2:
        holder[way[-1]] = source.choice([float("nan"), float("inf"), float("-inf")])
    else:
        holder[way[-1]] = source.choice(STRANGE)
    return json.dumps(content).encode()


def damaged(text, source):
    """Return bytes with some cut off, or a bit turned."""
    if source.random() < 0.4:
        return text[: source.randrange(len(text))]
    at = source.randrange(len(text))
    return text[:at] + bytes([text[at] ^ (1 << source.randrange(8))]) + text[at + 1 :]


def check_read(file, read, content):
    file.write_bytes(content)
    before = {path: path.read_bytes() for path in file.parent.rglob("*") if path.is_file()}
    try:
        read()
    except CLEAR as error:
        said = str(error)
        assert said and len(said) < 5000
        # A bare error of Python, without a word of ours on what is wrong.
        assert not isinstance(error, (UnicodeError, json.JSONDecodeError)), repr(error)
        assert not BARE.match(said), repr(error)
    after = {path: path.read_bytes() for path in file.parent.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before


def fuzz(case, folder, count):
    import warnings

    file, read = CASES[case](folder)
    read()
    text, source = file.read_bytes(), random.Random(case)
    content = json.loads(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for raw in RAW.values():
            check_read(file, read, raw)
        for number in range(count):
            check_read(file, read, changed(content, source) if number % 3 else damaged(text, source))


@pytest.mark.parametrize("case", CASES)
def test_json_files(case, tmp_path):
    fuzz(case, tmp_path, 30)


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES)
def test_json_files_at_length(case, tmp_path):
    fuzz(case, tmp_path, 300)
