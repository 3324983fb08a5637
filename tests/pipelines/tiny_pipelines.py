"""Real classic pipelines of every family that diffusers guides, with tiny random weights, built offline."""

from __future__ import annotations

from tests.pipelines.tiny_family import TinyFamily, images_of
from tests.pipelines.tiny_transformers import TRANSFORMERS
from tests.pipelines.tiny_unets import UNETS
from tests.pipelines.tiny_videos import VIDEOS

__all__ = ["FAMILIES", "TinyFamily", "images_of"]

FAMILIES: dict[str, TinyFamily] = {family.name: family for family in [*UNETS, *TRANSFORMERS, *VIDEOS]}
