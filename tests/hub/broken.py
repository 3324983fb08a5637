"""In a process whose Hub is the loopback one: break a push in every way, and look at what is left there.

Each fault hits a push of something new over something older. Afterwards the repository holds the old or the new, the
error says what to do, and the same push goes through once the fault is gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request

FOREVER = 99
# The clients try again by themselves, for 23 s, when what comes before the commit is answered by 500 or cut. So it is
# refused here, and cut in `PATIENT`.
FAULTS = {
    "the repository is refused": {"pattern": "POST /api/repos/create", "status": 501},
    "the list of files is refused": {"pattern": "POST .*/preupload/", "status": 501},
    "the batch of large files is refused": {"pattern": "POST .*/objects/batch", "status": 501},
    "a large file is refused": {"pattern": "PUT /lfs/", "status": 403},
    "the commit is refused": {"pattern": "POST .*/commit/", "status": 403},
    "the Hub answers the commit with 500": {"pattern": "POST .*/commit/", "status": 500},
    "the connection is cut in the commit": {"pattern": "POST .*/commit/", "cut_after": 20},
    "the answer to the commit is lost": {"pattern": "POST .*/commit/", "loses_answer": True},
}
PATIENT = {
    "the Hub answers large files with 500": {"pattern": "PUT /lfs/", "status": 500},
    "the connection is cut in a large file": {"pattern": "PUT /lfs/", "cut_after": 100},
}


def break_next(*failures):
    """Have the loopback Hub fail; return the failures that nothing has met since they were asked for."""
    body = json.dumps([{"count": FOREVER, **failure} for failure in failures]).encode()
    request = urllib.request.Request(os.environ["HF_ENDPOINT"] + "/minihub/failures", body, method="POST")
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def contents(repo, repo_type="model"):
    """Return the files of a repository by their hashes."""
    from huggingface_hub import HfApi

    entries = HfApi().list_repo_tree(repo, recursive=True, repo_type=repo_type)
    return {entry.path: entry.blob_id for entry in entries if hasattr(entry, "blob_id")}


def digest(folder):
    """Return the files of a folder by their hashes, without what clients keep there."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            found[os.path.relpath(path, folder)] = hashlib.sha256(open(path, "rb").read()).hexdigest()
    return found


def break_pushes(repo, change, push, *, ours=True, repo_type="model", skip=(), has_large=True, patient=False):
    """Push once, change what is pushed, and break the next push in every way; return the messages by fault.

    Args:
        repo: name on the Hub.
        change: makes it new.
        push: pushes it; called again and again.
        ours: whether errors must be of hfnoise and say what to do.
        skip: faults that this push does not meet.
        has_large: whether a file of it travels by Git LFS.
        patient: whether to wait until the clients give up what they try again.
    """
    from hfnoise.errors import PushError

    push()
    before = contents(repo, repo_type)
    change()
    messages = {}
    for name, fault in ((PATIENT if patient else {}) | FAULTS).items():
        if name in skip or (not has_large and "large file" in name):
            continue
        break_next(fault)
        try:
            push()
        except Exception as error:  # every kind: what it is, is looked at
            message, kind = str(error), error
        else:
            raise AssertionError(f"{repo}: {name}, and the push says nothing")
        met = break_next()
        assert met, f"{repo}: {name} was never met"
        left = contents(repo, repo_type)
        if name == "the answer to the commit is lost":
            new = left
        else:
            assert left == before, f"{repo}: {name} left {set(left) ^ set(before)}"
        if ours:
            assert isinstance(kind, PushError) and isinstance(kind, OSError), (repo, name, repr(kind))
            assert repo.split("/")[1] in message and "push again: " in message and "\n" not in message, message
            assert kind.__cause__ is not None
        messages[name] = message
    assert new != before and new.keys() >= before.keys(), f"{repo}: the lost commit is not whole"
    push()  # goes through, and finds all of it there
    assert contents(repo, repo_type) == new
    return messages
