"""hfnoise: noisy labels, privacy noise, quantisation noise and diffusion noise for the Hugging Face libraries.

Importing this package costs milliseconds: it imports nothing heavy. Public names (see `hfnoise list`) are imported
when they are first used (PEP 562), from the table in `hfnoise.methods`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
# Folders of a source checkout that setup.py maps to sub-packages of hfnoise.
_MAPPED_PARTS = ("trainers", "pipelines", "model_cards", "benchmarks")


class _CheckoutFinder:
    """Finds `hfnoise.trainers` and its siblings in a source checkout, where they lie beside `hfnoise/`.

    An installed wheel has them inside the package and never installs this finder. Only the mapped folders are found,
    so `hfnoise.tests` and `hfnoise.setup` stay unimportable.
    """

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        parent, _, part = fullname.partition(".")
        if parent != "hfnoise" or part not in _MAPPED_PARTS:
            return None
        folder = _ROOT / part
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


if (_ROOT / "setup.py").is_file() and not any(getattr(f, "__name__", "") == "_CheckoutFinder" for f in sys.meta_path):
    sys.meta_path.append(_CheckoutFinder)

from hfnoise.registration import install_hooks as _install_hooks  # noqa: E402  (the finder comes first)

_install_hooks()


def __getattr__(name: str) -> Any:
    from hfnoise.methods import public_names

    module = public_names().get(name)
    if module is None and name.startswith("Guided") and name.endswith("Pipeline"):
        module = "hfnoise.pipelines.guided"  # one for every pipeline of diffusers
    if module is None:
        from difflib import get_close_matches

        close = get_close_matches(name, public_names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else "; `hfnoise list` shows what it offers"
        raise AttributeError(f"module 'hfnoise' has no attribute {name!r}{hint}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from hfnoise.methods import public_names

    return sorted([*globals(), *public_names()])
