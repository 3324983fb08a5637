"""Names of pipelines on the command line: of the Hub, of a folder, or of an embedded world."""

from __future__ import annotations

from pathlib import Path

from hfnoise.errors import UsageError

# On the command line -> the folder below model_cards.
EMBEDDED = {
    "digits": "digits-sd",
    "digits-weak": "digits-sd-weak",
    "coloured-digits": "coloured-digits-sd",
    "shaded-digits": "shaded-digits-sd",
}
_PREFIX = "hfnoise:"


def resolve_pipeline(name: str) -> str:
    """Return what `from_pretrained` takes: for the name of an embedded pipeline its folder.

    Args:
        name (`str`): a Hub id, a folder, or one of `EMBEDDED`, with `hfnoise:` in front or not.

    Raises:
        UsageError: if a path is meant and there is no pipeline.

    Example:
        >>> from hfnoise.worlds.pipeline_names import resolve_pipeline
        >>> resolve_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        'stabilityai/stable-diffusion-xl-base-1.0'
    """
    short = name.removeprefix(_PREFIX)
    path = Path(name).expanduser()
    if short in EMBEDDED and not path.exists():
        return _embedded_folder(EMBEDDED[short])
    if name.startswith(_PREFIX):
        raise UsageError(f"there is no embedded pipeline {name!r}; there are {', '.join(EMBEDDED)}.")
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise UsageError(
                f"{name!r} holds no model_index.json: it is no folder of a diffusers pipeline. Load single files with "
                "from_single_file in Python, and save_pretrained what you get."
            )
        return str(path)
    # The Hub would be asked first, and would be said not to have it.
    if name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1:
        raise UsageError(f"no such folder: {str(path.absolute())!r}, given as --model_name_or_path {name}.")
    return name


def _embedded_folder(name: str) -> str:
    from hfnoise.worlds.digits_checkpoints import checkpoint_path

    try:
        return checkpoint_path(name)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
