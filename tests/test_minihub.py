"""The loopback Hub with the real clients: what is pushed is what is pulled, and a push that fails leaves nothing."""

import json
import textwrap

import pytest

pytestmark = pytest.mark.hub


@pytest.fixture
def run(run_python):
    """Return a function that runs indented code and returns the JSON that it printed last."""

    def run(code, **env):
        return json.loads(run_python(textwrap.dedent(code), env).splitlines()[-1])

    return run


# Two fresh imports of the modelling code; tests/trainers/test_hub_preference.py pulls what was pushed as well.
@pytest.mark.soak
def test_model_and_tokenizer_come_back_bit_equal(hub, run, tiny_model_path):
    head = run(
        """
        import json, os
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        model = AutoModelForCausalLM.from_pretrained(os.environ["MODEL"])
        model.push_to_hub("tiny")
        PreTrainedTokenizerFast.from_pretrained(os.environ["MODEL"]).push_to_hub("tiny")
        print(json.dumps(model.push_to_hub("tiny").oid))  # nothing is new: the last commit again
        """,
        MODEL=tiny_model_path,
    )
    history = hub.repository("tester/tiny").history()
    assert history[0].oid == head
    assert len(history) == 3, [commit.title for commit in history]  # made, model, tokenizer

    equal = run(
        """
        import json, os, torch
        from huggingface_hub.errors import RepositoryNotFoundError
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        pulled, local = (AutoModelForCausalLM.from_pretrained(name) for name in ("tester/tiny", os.environ["MODEL"]))
        weights = [torch.equal(*pair) for pair in zip(pulled.parameters(), local.parameters(), strict=True)]
        tokenizer = PreTrainedTokenizerFast.from_pretrained("tester/tiny")
        try:
            AutoModelForCausalLM.from_pretrained("tester/missing")
        except OSError as error:
            missing = isinstance(error.__cause__, RepositoryNotFoundError)
        print(json.dumps([all(weights), len(weights) > 10, tokenizer("the quick fox").input_ids, missing]))
        """,
        MODEL=tiny_model_path,
    )
    assert equal == [True, True, [3, 4, 6], True]
    assert hub.unrouted == []


@pytest.mark.slow
def test_dataset_comes_back(hub, run):
    rows = run(
        """
        import json
        from datasets import Dataset, load_dataset

        data = Dataset.from_dict({"prompt": ["a", "b", "c"], "flip_rate": [0.0, 0.25, 0.5]})
        data.push_to_hub("pairs")
        data.select([0]).push_to_hub("pairs", split="test")
        pulled = load_dataset("tester/pairs")
        print(json.dumps({split: pulled[split].to_list() for split in pulled}))
        """
    )
    assert rows["train"][1] == {"prompt": "b", "flip_rate": 0.25}
    assert [len(rows["train"]), len(rows["test"])] == [3, 1]
    assert "README.md" in hub.files("tester/pairs", kind="datasets")
    assert hub.unrouted == []


def test_hub_answers_as_the_api_expects(hub, run):
    """Branches, tags, pull requests, folders, deletions and the classes of errors."""
    seen = run(
        """
        import json, os
        from huggingface_hub import HfApi

        api, repo = HfApi(), "tester/notes"

        def refuses(function, *args, **kwargs):
            try:
                function(*args, **kwargs)
            except Exception as error:
                return type(error).__name__

        def upload(text, path, **kwargs):
            return api.upload_file(path_or_fileobj=text.encode(), path_in_repo=path, repo_id=repo, **kwargs)

        errors_seen = [
            refuses(api.model_info, repo),
            refuses(api.model_info, "missing"),
            refuses(upload, "text", "a.txt"),
        ]
        api.create_repo(repo)
        api.create_repo(repo, exist_ok=True)
        first = upload("first", "a.txt")
        upload("deep", "folder/below/b.txt")
        api.create_tag(repo, tag="v1")
        api.create_branch(repo, branch="side")
        upload("second", "a.txt", revision="side")
        pull_request = upload("third", "a.txt", create_pr=True)
        errors_seen += [
            refuses(api.create_repo, repo),
            refuses(api.create_branch, repo, branch="side"),
            refuses(api.model_info, repo, revision="missing"),
            refuses(api.hf_hub_download, repo, "missing.txt"),
            refuses(upload, "stale", "a.txt", parent_commit=first.oid),
            refuses(upload, "---\\ntags: [\\n---\\n", "README.md"),
            refuses(api.delete_file, "missing.txt", repo),
            refuses(api.upload_file, path_or_fileobj=b"x", path_in_repo="a", repo_id=repo, token=False),
            refuses(lambda: list(api.list_repo_tree(repo, "missing"))),
        ]
        def read(revision):
            return open(api.hf_hub_download(repo, "a.txt", revision=revision)).read()

        refs = api.list_repo_refs(repo, include_pull_requests=True)
        contents = [read(revision) for revision in ("main", "v1", "side", f"refs/pr/{pull_request.pr_num}")]
        names = [[ref.name for ref in found] for found in (refs.branches, refs.tags, refs.pull_requests)]
        top = [entry.path for entry in api.list_repo_tree(repo)]
        everything = [entry.path for entry in api.list_repo_tree(repo, recursive=True)]
        info = api.get_paths_info(repo, ["a.txt", "missing.txt"])
        upload("---\\ntags: [hfnoise]\\nlibrary_name: peft\\n---\\n# Card", "README.md")
        api.delete_folder("folder", repo)
        card = api.model_info(repo, files_metadata=True)
        snapshot = sorted(os.listdir(api.snapshot_download(repo)))
        api.delete_repo(repo)
        print(json.dumps({
            "errors": errors_seen, "contents": contents, "names": names, "top": top, "everything": everything,
            "sizes": [entry.size for entry in info], "card": [card.tags, card.library_name],
            "siblings": {file.rfilename: file.size for file in card.siblings}, "snapshot": snapshot,
            "gone": not api.repo_exists(repo),
        }))
        """
    )
    missing, invalid = "RepositoryNotFoundError", "RevisionNotFoundError"
    assert seen["errors"] == [
        missing, missing, missing, "HfHubHTTPError", "HfHubHTTPError", invalid, "RemoteEntryNotFoundError",
        "HfHubHTTPError", "ValueError", "RemoteEntryNotFoundError", "HfHubHTTPError", "RemoteEntryNotFoundError",
    ]  # fmt: skip
    assert seen["contents"] == ["first", "first", "second", "third"]
    assert seen["names"] == [["main", "side"], ["v1"], ["1"]]
    assert sorted(seen["top"]) == [".gitattributes", "a.txt", "folder"]
    assert "folder/below/b.txt" in seen["everything"] and "folder/below" in seen["everything"]
    assert seen["sizes"] == [5]
    assert seen["card"] == [["hfnoise"], "peft"]
    assert seen["snapshot"] == sorted(seen["siblings"]) == [".gitattributes", "README.md", "a.txt"]
    assert seen["siblings"]["a.txt"] == 5
    assert seen["gone"]
    assert hub.unrouted == []


PUSH_FOLDER = """
    import json, os, pathlib
    from huggingface_hub import HfApi

    folder = pathlib.Path("folder")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    api = HfApi()
    api.create_repo("tester/half", exist_ok=True)
    try:
        api.upload_folder(repo_id="tester/half", folder_path=folder)
        print(json.dumps("pushed"))
    except Exception as error:
        print(json.dumps(type(error).__name__))
"""


@pytest.mark.parametrize(
    ("wish", "outcome"),
    [
        (lambda hub: hub.fail_next("POST .*/commit/main", status=500), "HfHubHTTPError"),
        (lambda hub: hub.fail_next("PUT /lfs/", status=403), "RuntimeError"),
        (lambda hub: hub.cut_next("POST .*/commit/main", after=20), "WriteError RemoteProtocolError ReadError"),
    ],
    ids=["commit refused", "upload refused", "commit cut"],
)
def test_push_that_fails_leaves_no_half_commit(hub, run, wish, outcome):
    wish(hub)
    assert run(PUSH_FOLDER) in outcome.split()
    assert hub.files("tester/half").keys() == {".gitattributes"}
    assert len(hub.repository("tester/half").history()) == 1
    # The failure was wished for once, so the same push now goes through.
    assert run(PUSH_FOLDER) == "pushed"
    assert hub.files("tester/half").keys() == {".gitattributes", "config.json", "model.safetensors"}


@pytest.mark.slow
def test_clients_repair_cut_transfers(hub, run):
    """An upload that was cut is sent again; a download that was cut goes on where it stopped."""
    hub.cut_next("PUT /lfs/", after=1000)
    assert run(PUSH_FOLDER) == "pushed"
    assert sum(line.startswith("PUT /lfs/") for line in hub.requests) == 2

    hub.cut_next("GET /tester/half/resolve/.*safetensors", after=1000)
    digest = run(
        """
        import hashlib, json
        from huggingface_hub import hf_hub_download

        path = hf_hub_download("tester/half", "model.safetensors")
        print(json.dumps(hashlib.sha256(open(path, "rb").read()).hexdigest()))
        """
    )
    assert list(hub.large_files) == [digest]
    assert sum("GET /tester/half/resolve" in line for line in hub.requests) == 2
