"""Where a model comes from: its base and the base's revision, the command, the versions."""

from __future__ import annotations

import math
import re
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

import hfnoise
from hfnoise.worlds import arithmetic, docstrings
from hfnoise.worlds.pipeline_names import EMBEDDED

# Of transformers, TRL and trackers; the value is a secret. Those of a tokenizer, such as `--eos_token`, are none.
_TOKEN_OPTION = re.compile(
    r"--(?!(?:\w+[-_])?(?:eos|bos|pad|unk|sep|cls|mask|image|stop)[-_]token$)[\w-]*(token|api[-_]?key|password|secret)",
    re.IGNORECASE,
)
# A token of the Hub, wherever it stands.
_TOKEN = re.compile(r"\bhf_\w{30,}")
_LIBRARIES = ("torch", "transformers", "trl", "diffusers", "accelerate", "peft", "datasets")
_NO_PROGRAM = ("", "-", "-c", "ipykernel_launcher.py", "colab_kernel_launcher.py")
# The folder below model_cards -> its name on command lines.
_EMBEDDED = {
    docstrings.MODEL_FOLDER: docstrings.NAME,
    arithmetic.MODEL_FOLDER: "hfnoise:arithmetic",
    **{folder: f"hfnoise:{name}" for name, folder in EMBEDDED.items()},
}
# Folders of an embedded pipeline that are no part of it.
_BESIDE = ("judge", "verifier")
# A part of a model is loaded from the folder of a snapshot in the cache, and knows no other name.
_SNAPSHOT = re.compile(r"models--(?P<repo>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})")
# Files by which a snapshot in the cache is found.
_KNOWN_FILES = ("config.json", "model_index.json", "unet/config.json", "transformer/config.json")


@dataclass(frozen=True)
class Base:
    """The model that a run began from.

    Args:
        name (`str`): how the first sentence calls it, in Markdown.
        revision (`str`): which one it was, in words.
        hub_id (`str`, *optional*): its repository.
        commit (`str`, *optional*): the commit of that, where it is known.
    """

    name: str
    revision: str
    hub_id: str | None = None
    commit: str | None = None

    @property
    def capitalized(self) -> str:
        """The name at the beginning of a sentence."""
        return self.name[0].upper() + self.name[1:]


def base_of(path: str | None, commit: str | None = None, revision: str | None = None) -> Base:
    """Return what a card says of the model of that name.

    Args:
        path (`str`, *optional*): a Hub id, a folder (one in the Hub's cache is of a repository), or nothing for a
            model that was made in memory.
        commit (`str`, *optional*): that was loaded, where the model remembers it; else that of the cache.
        revision (`str`, *optional*): the branch or tag that was asked for, for the look into the cache.

    Example:
        >>> from hfnoise.cards import base_of
        >>> base_of("someone/model", commit="0123456789abcdef0123456789abcdef01234567").revision
        '[`0123456`](https://huggingface.co/someone/model/tree/0123456789abcdef0123456789abcdef01234567)'
        >>> base_of("").revision
        'none: it was not loaded from anywhere'
    """
    if not path:
        return Base("a model made in memory", "none: it was not loaded from anywhere")
    snapshot = _SNAPSHOT.search(path)
    if snapshot:
        path, commit = snapshot["repo"].replace("--", "/", 1), snapshot["commit"]
    elif Path(path).is_dir() or not _is_repository(path):
        embedded = embedded_name(path)
        if embedded:
            return Base(embedded, f"that of hfnoise {hfnoise.__version__}")
        return Base(f"the local model `{Path(path).absolute().name}`", "none: it is a local folder")
    is_known = bool(commit or revision)
    commit = commit or _cached_commit(path, revision)
    link = f"[{path}](https://huggingface.co/{path})"
    if commit is None:
        return Base(link, "not known: neither the model nor the cache remembers it", path)
    guess = "" if is_known else ", the one in the cache: the model does not remember which it was"
    return Base(link, f"[`{commit[:7]}`](https://huggingface.co/{path}/tree/{commit}){guess}", path, commit)


def trained_base(model: Any, given: str | None = None) -> Base:
    """Return what a card says of the base of a model of transformers, with an adapter or without.

    Args:
        model (`PreTrainedModel` or `PeftModel`): whose configuration remembers name and commit.
        given (`str`, *optional*): the name that the user gave; it goes before.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(inner, "config", None)
    name = getattr(config, "_name_or_path", None)
    return base_of(given or name, getattr(config, "_commit_hash", None) if given in (None, name) else None)


def hub_name(path: str | None) -> str | None:
    """Return the identifier of the base model; a local folder, or a model built in memory, has none."""
    return base_of(path).hub_id


def embedded_name(path: str) -> str | None:
    """Return how a base model that is part of hfnoise is called, with its size; `None` for any other."""
    folder, name = Path(path), _EMBEDDED.get(Path(path).name)
    if name is None or folder.parent != Path(str(files("hfnoise.model_cards"))):
        return None
    parameters = 0
    for file in folder.rglob("*.safetensors"):
        if file.parent.name not in _BESIDE:
            with safe_open(file, framework="pt") as weights:
                parameters += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return f"`{name}` ({parameters / 1e6:.2f} M parameters, part of hfnoise)"


def versions_by_library() -> dict[str, str]:
    """Return the versions of hfnoise and of those of the libraries it stands on that are installed."""
    found = {"hfnoise": hfnoise.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def library_versions() -> str:
    """Return the versions of hfnoise and of the libraries it stands on, one line."""
    return ", ".join(f"{name} {number}" for name, number in versions_by_library().items())


def command_line() -> str:
    """Return the command line of this process as it can be typed again, without access tokens."""
    path, given = Path(sys.argv[0]), _without_tokens(sys.argv[1:])
    if path.name in _NO_PROGRAM:
        return "python  # code that was typed in, or a notebook: there was no command line"
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set by `python -m`
    if spec is not None:
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *given])
    # Where somebody's files lie is nobody's business.
    program = path.name if path.is_absolute() else str(path)
    return shlex.join([*(["python"] if path.suffix == ".py" else []), program, *given])


def _without_tokens(arguments: list[str]) -> list[str]:
    """Return the arguments with the values of options like `--hub_token` left out: a card is public."""
    shown: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if shown and _TOKEN_OPTION.fullmatch(shown[-1]):
            argument = "HIDDEN"
        elif equals and _TOKEN_OPTION.fullmatch(name):
            argument = f"{name}=HIDDEN"
        shown.append(_TOKEN.sub("HIDDEN", argument))
    return shown


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:  # a folder that is no longer there
        return False
    return True


def _cached_commit(repo_id: str, revision: str | None) -> str | None:
    for name in _KNOWN_FILES:
        found = try_to_load_from_cache(repo_id, name, revision=revision)
        snapshot = _SNAPSHOT.search(found) if isinstance(found, str) else None
        if snapshot:
            return snapshot["commit"]
    return None
