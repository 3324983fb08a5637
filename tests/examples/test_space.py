"""The Space: what people type, what is drawn and counted, and the app as clients of Gradio see it."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples" / "space"
FEW = {"steps": 4, "pictures": 2}


@pytest.fixture(autouse=True)
def space(monkeypatch):
    """Make the modules of the Space importable, as they are where it runs; a pipeline is forgotten after the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("SPACE_ID", raising=False)


def drawing(**changes):
    from noise_space.columns import Drawing

    return Drawing(**({"model": "shaded-digits-sd", "prompt": "the digit two on a dark background"} | FEW | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "The prompt is empty: type one"),
        ({"prompt": "x" * 1001}, "The prompt has 1001 characters; at most 1000"),
        ({"model": None}, "The model is empty"),
        ({"seed": "abc"}, "The seed must be a whole number from 0 to 4294967287, got 'abc'"),
        ({"seed": None}, "The seed must be .*, got nothing"),
        ({"seed": 1.5}, "The seed must be .*, got 1.5"),
        ({"seed": -1}, "The seed must be .*, got -1"),
        ({"seed": float("nan")}, "The seed must be .*, got nan"),
        ({"steps": 101}, "The number of steps must be a whole number from 1 to 100, got 101"),
        ({"pictures": 0}, "The number of pictures must be a whole number from 1 to 8, got 0"),
        ({"guidance_scale": "much"}, "The guidance scale must be a number from 0 to 50, got 'much'"),
    ],
)
def test_what_cannot_be_drawn_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        drawing(**changes)


def test_numbers_of_json_are_taken():
    assert drawing(seed=3.0, pictures="2").seeds() == range(3, 5)


@pytest.mark.parametrize("name", ["owner/name", "name", "a-b.c/d_e"])
def test_hub_ids(name, monkeypatch):
    from noise_space.inputs import repository

    monkeypatch.setenv("SPACE_ID", "owner/space")
    assert repository(f" {name} ", "The model") == name


@pytest.mark.parametrize("name", ["/etc", "..", "~", "a/b/c", "./model", "a\\b", "owner/"])
def test_a_space_reads_no_files_of_its_machine(name, monkeypatch):
    from noise_space.inputs import repository

    monkeypatch.setenv("SPACE_ID", "owner/space")
    with pytest.raises(ValueError, match="a Space reads no local files"):
        repository(name, "The dataset")


def test_local_folders_elsewhere(tmp_path, monkeypatch):
    from noise_space.inputs import repository

    assert repository(str(tmp_path), "The model") == str(tmp_path)
    with pytest.raises(ValueError, match="neither a Hub id such as owner/name nor a folder that exists here"):
        repository(str(tmp_path / "none"), "The model")
    # A folder of the working directory that looks like a Hub id is a folder, and so not for visitors of a Space.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secrets").mkdir()
    monkeypatch.setenv("SPACE_ID", "owner/space")
    with pytest.raises(ValueError, match="reads no local files"):
        repository("secrets", "The dataset")


def test_columns_in_the_order_of_the_page():
    from noise_space.columns import ADAPTIVE, CFG, GOLDEN, TOGETHER, chosen_columns

    found = chosen_columns([TOGETHER, GOLDEN, CFG, ADAPTIVE])
    assert list(found.items()) == [
        (CFG, ()), (ADAPTIVE, (ADAPTIVE,)), (GOLDEN, (GOLDEN,)), (TOGETHER, (ADAPTIVE, GOLDEN)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ticked", "message"),
    [
        ([], "tick at least one .* got nothing"),
        (["CFG"], "got CFG"),
        (["APG", "All ticked, together"], "at least two"),
    ],
)
def test_columns_that_are_none(ticked, message):
    from noise_space.columns import chosen_columns

    with pytest.raises(ValueError, match=message):
        chosen_columns(ticked)


def test_options_reach_the_guiders():
    from noise_space.columns import ADAPTIVE, PROJECTED

    guider = drawing(threshold=0.97, eta=0.3, norm_threshold=2.0, momentum=-0.4).guider([ADAPTIVE, PROJECTED]).make()
    assert guider.threshold == 0.97
    assert (guider.inner.eta, guider.inner.norm_threshold, guider.inner.momentum) == (0.3, 2.0, -0.4)
    assert drawing().guider([PROJECTED]).make().norm_threshold == "auto"
    assert drawing().guider([]) is None


def test_evaluations_are_counted_by_row():
    from noise_space.counting import counted

    class Denoiser(torch.nn.Module):
        def forward(self, sample=None, other=None):
            return sample

    denoiser, start = Denoiser(), torch.nn.Identity()
    with counted([denoiser], [start]) as count:
        denoiser(torch.zeros(6, 4))
        denoiser(other=torch.zeros(3), sample=torch.zeros(2, 4))
        denoiser([torch.zeros(4), torch.zeros(4)])
        start(torch.zeros(3, 4))
    denoiser(torch.zeros(6, 4))
    assert (count.denoiser, count.start) == (10, 3)


def test_a_few_things_are_kept():
    from noise_space.models import Kept

    kept, loaded = Kept(2), []

    def load(name):
        with kept.use(name, lambda: loaded.append(name) or name.upper()) as thing:
            return thing

    assert [load(name) for name in "abacab"] == list("ABACAB")
    # "a" is used in between, so "b" goes for "c" and comes again.
    assert loaded == list("abcb")
    assert len(kept) == 2


def test_what_cannot_be_loaded_is_not_kept():
    from noise_space.models import Kept

    kept = Kept(1)
    with (
        pytest.raises(OSError, match="no network"),
        kept.use("a", lambda: (_ for _ in ()).throw(OSError("no network"))),
    ):
        pass
    with kept.use("a", lambda: "thing") as thing:
        assert (thing, len(kept)) == ("thing", 1)


def test_warnings_and_logs_become_notes():
    import logging

    from noise_space.columns import ADAPTIVE
    from noise_space.notes import collected_notes

    with collected_notes() as notes:
        drawing(threshold=0.991).guider([ADAPTIVE]).make()
        for _ in range(2):
            logging.getLogger("hfnoise.pipelines.guided").warning("said %s", "twice")
    assert [note[:20] for note in notes] == ["said twice", "threshold=0.991 is o"]


def test_captions():
    from noise_space.drawing import Column
    from noise_space.pictures import caption, grid_picture

    images = tuple(Image.new("L", (16, 16), level) for level in (0, 90, 180, 255))
    stock = Column("CFG (stock)", images=images, evaluations=40.0, seconds=1.0)
    other = Column("APG", images=images, evaluations=27.25, start_evaluations=1.0, seconds=1.0, notes=("a < b",))
    assert "<b>40</b> evaluations per picture</div>" in caption(stock, stock)
    assert "<b>27.25</b> evaluations per picture" in caption(other, stock) and "-32 %" in caption(other, stock)
    assert "and 1 of a small network" in caption(other, stock) and "a &lt; b" in caption(other, stock)
    assert "<b>?</b>" in caption(Column("APG", images=images), stock)
    refused = caption(Column("APG", refusal="<script>"), stock)
    assert "Not drawn" in refused and "<script>" not in refused
    # Squares, not a blur: 16 pixels of 6 x 6 each, four pictures with a margin around them.
    assert grid_picture(images).size == (204, 204) and len(grid_picture(images).getcolors()) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip_share": 0.5}, "The share of flipped labels must be a number from 0 to 0.45, got 0.5"),
        ({"pairs": 5000}, "The number of pairs must be a whole number from 50 to 1200, got 5000"),
        ({"seed": "abc"}, "The seed must be .* got 'abc'"),
        ({"dataset": "/no/such/file.json"}, "The dataset '/no/such/file.json' is neither a Hub id"),
        ({"learning_rate": 0}, "The learning rate must be a number from 1e-09 to 1, got 0"),
    ],
)
def test_audits_that_cannot_be_made(changes, message):
    from noise_space.labels import Audit

    with pytest.raises(ValueError, match=message):
        Audit(**changes)


def test_rows_of_a_dataset_that_is_named(tmp_path, make_pairs):
    from noise_space.labels import Audit

    path = tmp_path / "pairs.jsonl"
    make_pairs(130, score=list(range(130))).to_json(path)
    train, audited = Audit(dataset=str(path), pairs=60, flip_share=0.0).datasets()
    assert (len(train), len(audited)) == (60, 60) and "score" not in train.column_names
    assert not set(train["prompt"]) >= set(audited["prompt"])
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        Audit(dataset=str(path), split="test").datasets()
    make_pairs(99).to_json(path)
    with pytest.raises(ValueError, match="has 99 pairs in 'train'; at least 100 are needed"):
        Audit(dataset=str(path)).datasets()


def test_the_card_of_the_space():
    from huggingface_hub import metadata_load

    data = metadata_load(FOLDER / "README.md")
    assert data["sdk"] == "gradio" and (FOLDER / data["app_file"]).is_file()
    assert len(data["short_description"]) <= 60
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {data["colorFrom"], data["colorTo"]} <= colours
    low, high = re.search(
        r"gradio>=([\d.]+),<(\d+)", (FOLDER / "requirements.txt").read_text(encoding="utf-8")
    ).groups()
    assert data["sdk_version"].startswith(low) and int(data["sdk_version"].split(".")[0]) < int(high)


def test_a_hub_that_is_out_of_reach(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError
    from noise_space import refusals

    def fail():
        try:
            raise LocalEntryNotFoundError("no connection")
        except LocalEntryNotFoundError:
            raise OSError("x/y does not appear to have a file named model_index.json.")  # noqa: B904, as diffusers

    for offline, hint in ((True, "HF_HUB_OFFLINE is set here"), (False, "The Hub cannot be reached from here")):
        monkeypatch.setattr(refusals, "HF_HUB_OFFLINE", offline)
        with pytest.raises(OSError) as caught:
            fail()
        assert hint in refusals.in_words(caught.value)
    assert refusals.in_words(OSError("gone")) == "gone"
    assert refusals.in_words(TypeError("a\n b")) == "TypeError: a b"


# What takes longer. --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_columns_with_their_counts_and_their_python():
    from noise_space.columns import CFG, COLUMNS, GOLDEN, ONE_MORE_STEP, TOGETHER
    from noise_space.drawing import draw_columns

    found = {column.name: column for column in draw_columns(drawing(), COLUMNS)}
    assert list(found) == list(COLUMNS) and not any(column.refusal for column in found.values())
    assert found[CFG].evaluations == 8 and found[GOLDEN].evaluations == 11
    assert [found[name].start_evaluations for name in (CFG, GOLDEN, ONE_MORE_STEP, TOGETHER)] == [0, 0, 1, 1]
    # The guider's own report counts the steps; golden noise takes three evaluations before them.
    steps = int(re.search(r"(\d+) of 16 evaluations", " ".join(found[TOGETHER].notes))[1])
    assert found[TOGETHER].evaluations == steps / 2 + 3
    for name in (CFG, TOGETHER):
        names = {}
        exec(found[name].python, names)
        assert [image.tobytes() for image in names["images"]] == [image.tobytes() for image in found[name].images]


@pytest.mark.slow
def test_two_people_at_once_do_not_mix():
    from noise_space.columns import ADAPTIVE, CFG, GOLDEN
    from noise_space.drawing import draw_columns

    asked = [(drawing(threshold=0.5), [ADAPTIVE, GOLDEN]), (drawing(seed=5), [CFG, ADAPTIVE])]
    results = [None, None]

    def run(number):
        wanted, ticked = asked[number]
        results[number] = [(c.evaluations, [i.tobytes() for i in c.images]) for c in draw_columns(wanted, ticked)]

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = list(results)
    for number in (0, 1):
        run(number)
    assert together == results


@pytest.mark.slow
def test_refusals_stand_in_their_column(tmp_path):
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler
    from noise_space.columns import ADAPTIVE, CFG, GOLDEN, ONE_MORE_STEP
    from noise_space.drawing import draw_columns

    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    asked = drawing(threshold=1.5, golden=str(tmp_path), one_more_step="nobody/nothing", seed=1)
    plain, adaptive, golden, start = draw_columns(asked, [CFG, ADAPTIVE, GOLDEN, ONE_MORE_STEP])
    assert len(plain.images) == 2 and not plain.refusal
    assert "threshold must lie in (0, 1], got 1.5" in adaptive.refusal and not adaptive.images
    assert "holds no network of golden noise" in golden.refusal and "nobody/nothing" in start.refusal
    pipe = new_digits_pipeline(width=8)
    parts = pipe.components | {"scheduler": LCMScheduler.from_config(pipe.scheduler.config)}
    LatentConsistencyModelPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    (adaptive,) = draw_columns(drawing(model=str(tmp_path)), [ADAPTIVE])
    assert "LatentConsistencyModelPipeline has no unconditional prediction" in adaptive.refusal
    for name in ("nobody/nothing", str(tmp_path / "vae")):
        with pytest.raises(ValueError, match="cannot be loaded: .*model_index.json"):
            list(draw_columns(drawing(model=name), [CFG]))


@pytest.mark.slow
def test_an_audit_that_is_refused_says_so():
    from noise_space.labels import Audit, find_flips

    said = []
    found = find_flips(Audit(pairs=50), lambda share, what: said.append((share, what)))
    assert "not estimated\n50 pairs are too few" in found.verdict()
    assert [share for share, _ in said] == sorted(share for share, _ in said) and "training, step 2" in dict(
        said
    ).values()
    assert "p_flip ranks the pairs but its level means nothing" in found.verdict()
    assert found.verdict().count("too few") == 1
    assert len(found.suspects(10)) == 10 and {row[3] for row in found.suspects()} == {"yes", "no"}
    with pytest.raises(ValueError, match="'nobody/nothing' cannot be trained on"):
        find_flips(Audit(pairs=50, model="nobody/nothing"), lambda share, what: None)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning")  # datasets 5.2 on pyarrow 25, in sort
@pytest.mark.parametrize("kind", ["world", "file"])
def test_the_python_of_an_audit(kind, make_pairs, tmp_path, monkeypatch):
    from noise_space.labels import Audit, find_flips

    make_pairs(120).to_json(tmp_path / "pairs.jsonl")
    audit = Audit(pairs=50) if kind == "world" else Audit(dataset=str(tmp_path / "pairs.jsonl"), pairs=60, seed=2)
    found = find_flips(audit, lambda share, what: None)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(audit.python(), names)
    assert names["suspects"]["margin"][:] == pytest.approx(sorted(found.margins.tolist()), abs=1e-6)


JOBS = """
from noise_space.app import build_app

app = build_app()
jobs = [event for event in app.fns.values() if event.queue]
assert {event.api_name for event in jobs} >= {"draw", "find_flips"} and len(jobs) >= 4, jobs
assert {(event.concurrency_id, event.concurrency_limit) for event in jobs} == {("compute", 1)}, jobs
assert app.analytics_enabled is False
"""


@pytest.mark.soak
def test_every_job_waits_for_the_others():
    pytest.importorskip("gradio_client", reason="gradio is not installed: pip install 'hfnoise[space]'")
    # In a process of its own: Gradio leaves event loops open, which pytest would hold against whatever runs next.
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    done = subprocess.run([sys.executable, "-c", JOBS], cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.soak
def test_clients(space_url):
    gradio_client = pytest.importorskip("gradio_client")
    from gradio_client.exceptions import AppError

    client = gradio_client.Client(space_url, verbose=False)
    found = client.predict(columns=["CFG (stock)", "Adaptive Guidance"], steps=4, pictures=1, api_name="/draw")
    assert [column["name"] for column in found] == ["CFG (stock)", "Adaptive Guidance"]
    assert found[0]["evaluations"] == 8 and "4 steps" in found[1]["notes"][0]
    for wrong, message in (
        ({"prompt": ""}, "The prompt is empty"),
        ({"seed": "abc"}, "The seed must be a whole number"),
        ({"model": "nobody/nothing"}, "'nobody/nothing' cannot be loaded"),
        ({"columns": []}, "tick at least one"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(**{"columns": ["APG"], **wrong}, api_name="/draw")
    assert {name for name in client.view_api(return_format="dict")["named_endpoints"]} == {"/draw", "/find_flips"}
