"""Parts of ours in an index of diffusers, as `["hfnoise", <class>]`: registered where it looks up libraries.

Imported by a hook (`hfnoise.registration`) in the middle of the import of diffusers. What is registered are strings:
the classes behind them are imported when a repository names them.
"""

from __future__ import annotations

from importlib import import_module

# Public names of hfnoise that are bases of parts of a pipeline, and how diffusers saves and loads those: the
# guiders, and of the initial noises those with weights.
_PARTS = ("UpdateGuidance", "NPNet", "NoisePromptNet", "OneMoreStep")
_BASES = {name: ["save_pretrained", "from_pretrained"] for name in _PARTS}


def register_classes() -> None:
    """Let diffusers save and load our guiders and networks as parts of a pipeline, by `hfnoise` and their class.

    Not documented by diffusers: two dictionaries, of which the second was copied from the first.

    Raises:
        AttributeError: if this version of diffusers has none; the hook turns it into a warning.
    """
    # There already, unless this module is imported by itself.
    loading = import_module("diffusers.pipelines.pipeline_loading_utils")
    loading.LOADABLE_CLASSES["hfnoise"] = dict(_BASES)
    loading.ALL_IMPORTABLE_CLASSES.update(_BASES)


register_classes()
