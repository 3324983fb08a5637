"""Images and videos on disk, and all of them in one picture."""

from __future__ import annotations

import logging
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Smaller images are enlarged in the grid, or nobody sees them.
_LEAST_PIXELS = 96
_MOST_COLUMNS = 8
_MARGIN = 4


def save_sample(drawn: Any, folder: Path, name: str) -> str:
    """Write an image as PNG; a video as MP4, or where that cannot be made as a folder of PNGs.

    Args:
        drawn: an image of PIL, or a list of them.
        folder (`Path`): that exists.
        name (`str`): without ending.

    Returns:
        `str`: the name below `folder`.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from hfnoise.pipelines.picture_files import save_sample
        >>> save_sample(Image.new("L", (8, 8)), Path("."), "0000-seed0")
        '0000-seed0.png'
    """
    if not isinstance(drawn, (list, tuple)):
        drawn.save(folder / f"{name}.png")
        return f"{name}.png"
    if can_write_videos():
        from diffusers.utils import export_to_video

        export_to_video(list(drawn), str(folder / f"{name}.mp4"))
        return f"{name}.mp4"
    (folder / name).mkdir(exist_ok=True)
    for number, frame in enumerate(drawn):
        frame.save(folder / name / f"frame-{number:04d}.png")
    return name


def can_write_videos() -> bool:
    """Return whether the packages are here that diffusers writes MP4 with: imageio and imageio-ffmpeg."""
    return find_spec("imageio") is not None and find_spec("imageio_ffmpeg") is not None


def save_grid(drawn: list[Any], path: Path, columns: int | None = None) -> None:
    """Write one picture of all images; of a video its middle frame.

    Args:
        drawn (`list`): images of PIL, or lists of them.
        path (`Path`): a PNG file.
        columns (`int`, *optional*): about as many as rows by default, 8 at most.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from hfnoise.pipelines.picture_files import save_grid
        >>> save_grid([Image.new("L", (8, 8))] * 3, Path("grid.png"))
        >>> with Image.open("grid.png") as grid:
        ...     grid.size
        (204, 204)
    """
    from PIL import Image

    images = [image[len(image) // 2] if isinstance(image, (list, tuple)) else image for image in drawn]
    columns = columns or min(_MOST_COLUMNS, math.ceil(len(images) ** 0.5))
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    factor = max(1, math.ceil(_LEAST_PIXELS / min(width, height)))
    cell = (width * factor + _MARGIN, height * factor + _MARGIN)
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), "white")
    for number, image in enumerate(images):
        enlarged = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        grid.paste(enlarged, (_MARGIN + number % columns * cell[0], _MARGIN + number // columns * cell[1]))
    grid.save(path)
