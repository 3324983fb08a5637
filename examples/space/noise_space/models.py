"""Pipelines and networks by name, loaded once, a few of them kept; one user at a time."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from noise_space.inputs import repository

# Names of the embedded worlds: shipped with hfnoise, nothing is downloaded.
EMBEDDED_PIPELINES = ("digits-sd", "digits-sd-weak", "coloured-digits-sd", "shaded-digits-sd")
# The free machine of a Space has 16 GB; a pipeline in float32 takes 4 (Stable Diffusion 1) to 14 (XL).
PIPELINES_KEPT = 2
NETWORKS_KEPT = 4


class Kept:
    """The last few things that were loaded.

    Args:
        limit (`int`): how many are kept; the one that was not used for the longest time goes before another is loaded.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._things: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._things)

    @contextmanager
    def use(self, name: str, load: Callable[[], Any]) -> Iterator[Any]:
        """Yield the thing of that name, loaded if need be; no other thread gets one within the block.

        A pipeline that is called has its state in itself: its scheduler, its guider, the slots of hfnoise.
        """
        with self._lock:
            if name not in self._things:
                while len(self._things) >= self.limit:
                    self._things.popitem(last=False)
                    gc.collect()
                self._things[name] = load()
            self._things.move_to_end(name)
            yield self._things[name]


PIPELINES = Kept(PIPELINES_KEPT)
NETWORKS = Kept(NETWORKS_KEPT)


def use_pipeline(name: Any) -> Any:
    """Return a block within which the pipeline of a name is ours: an embedded world, a Hub id or a folder.

    Raises:
        ValueError: if the name is none of these.
    """
    if name in EMBEDDED_PIPELINES:
        return PIPELINES.use(name, lambda: _embedded(name))
    checked = repository(name, "The model")
    return PIPELINES.use(checked, lambda: _named(checked))


def load_line(name: str) -> str:
    """Return the line of Python that loads the pipeline of a name."""
    if name in EMBEDDED_PIPELINES:
        return f"pipe = load_digits_pipeline({name!r})"
    return f"pipe = hfnoise.AutoGuidedPipeline.from_pretrained({name!r}, use_safetensors=True)"


def _embedded(name: str) -> Any:
    from hfnoise.worlds.digits_checkpoints import load_digits_pipeline

    pipe = load_digits_pipeline(name)
    # The first call of a process takes longer than others, which would be held against the first column.
    pipe("", num_inference_steps=1)
    return pipe


def _named(name: str) -> Any:
    import hfnoise

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    # No pickles, and no code from the Hub: `trust_remote_code` stays off.
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(name, use_safetensors=True, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
