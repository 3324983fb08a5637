"""Real classic pipelines of every family that diffusers guides, with tiny random weights, built offline."""

from __future__ import annotations

from hfnoise.worlds.tiny_pipelines.family import TinyFamily, images_of
from hfnoise.worlds.tiny_pipelines.transformers import TRANSFORMERS
from hfnoise.worlds.tiny_pipelines.unets import UNETS
from hfnoise.worlds.tiny_pipelines.videos import VIDEOS

__all__ = ["FAMILIES", "STOCK_WARNINGS", "TinyFamily", "images_of"]

FAMILIES: dict[str, TinyFamily] = {family.name: family for family in [*UNETS, *TRANSFORMERS, *VIDEOS]}

# What stock diffusers warns of whatever it is given; filters for `pytest.mark.filterwarnings`.
STOCK_WARNINGS = (
    # The schedulers make numpy arrays of tensors.
    "ignore:__array__ implementation:DeprecationWarning",
    # Chroma imports the embedding by its old place.
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning",
    # The text encoder of Kolors, when it is imported.
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
    # Mochi computes its positions under an autocast that the CPU has not.
    "ignore:In CPU autocast, but the target dtype:UserWarning",
)
