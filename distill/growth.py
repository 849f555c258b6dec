"""What a run's images look like on the way: a small sheet whenever a level of the pyramid is done."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from sfm.distill.directory import write_file, writing
from sfm.distill.images import pixels

CLASSES, TILE = 10, 64
"""How many classes a sheet shows, and the side of one image in it, in pixels."""


def write_sheet(
    folder: Path, step: int, levels: Sequence[torch.Tensor], classes: int, ipc: int, canvas: int
) -> None:
    """Write ``folder/step_<n>.png``: the first image of each of the first ten classes, side by side.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    step : int
        Steps done.
    levels : sequence of Tensor, shapes (classes * ipc, 3, r, r)
    classes, ipc : int
    canvas : int
        Side of the images, in pixels; tiles are at most 64.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    first = [c * ipc for c in range(min(classes, CLASSES))]
    side = min(canvas, TILE)
    sheet = Image.new("RGB", (len(first) * side, side))
    for place, image in enumerate(pixels([level[first] for level in levels], canvas)):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (place * side, 0))
    data = BytesIO()
    sheet.save(data, "PNG", optimize=True)
    with writing(folder):
        folder.mkdir(exist_ok=True)
    write_file(folder / f"step_{step:08d}.png", data.getvalue())
