"""Verifiers by name, for command lines: the classifiers of the embedded worlds, and models of transformers."""

from __future__ import annotations

from typing import Any

import torch

from hfnoise.pipelines.image_text_verifier import clip_verifier
from hfnoise.pipelines.verifiers import Verifier
from hfnoise.worlds.digits_checkpoints import CHECKPOINTS
from hfnoise.worlds.digits_verifier import digit_verifier
from hfnoise.worlds.pipeline_names import EMBEDDED


def is_embedded(name: str) -> bool:
    """Return whether a name is that of an embedded world, with `hfnoise:` in front or not.

    Example:
        >>> from hfnoise.pipelines.named_verifiers import is_embedded
        >>> is_embedded("digits")
        True
    """
    return name.removeprefix("hfnoise:") in EMBEDDED


def named_verifier(
    name: str, *, kind: str = "verifier", processor: str | None = None, device: torch.device | str | None = None
) -> Verifier:
    """Return the verifier of a name.

    Args:
        name (`str`): an embedded world (`digits`, `coloured-digits`, ...), or a Hub id or folder of a model of images
            and text of transformers, such as CLIP, SigLIP and PickScore.
        kind (`str`, defaults to `"verifier"`): of an embedded world: that, or `"judge"`, which is independent of it.
        processor (`str`, *optional*): Hub id or folder of the model's processor; that of the model by default.
        device (*optional*): of the model.

    Raises:
        OSError: if there is no model of that name.
        TypeError: if it is none of images and text.
        ValueError: if a processor is given for an embedded world.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.named_verifiers import named_verifier
        >>> named_verifier("digits")(torch.zeros(1, 1, 16, 16), ["the digit one"]).shape
        torch.Size([1])
    """
    if is_embedded(name):
        if processor is not None:
            raise ValueError(f"the verifier {name!r} is an embedded one, and needs no processor: leave it out.")
        checkpoint = EMBEDDED[name.removeprefix("hfnoise:")]
        return digit_verifier(kind, checkpoint, CHECKPOINTS[checkpoint])
    from transformers import AutoModel, AutoProcessor

    model: Any = AutoModel.from_pretrained(name)
    return clip_verifier(model.eval().to(device or "cpu"), AutoProcessor.from_pretrained(processor or name))
