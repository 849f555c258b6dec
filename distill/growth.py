"""What a run's images look like on the way: a small sheet whenever a level of the pyramid is done."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch import Tensor

from sfm.atomic import make_folder
from sfm.distill.directory import write_file, writing
from sfm.distill.group import ALONE, Group
from sfm.distill.images import pixels

CLASSES, TILE = 10, 64
"""How many classes a sheet shows, and the side of one image in it, in pixels."""


def first_images(levels: Sequence[Tensor], classes: int, ipc: int, group: Group = ALONE) -> list[Tensor]:
    """Return the pyramids that a sheet shows, in the first process: the first image of the first ten classes.

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        The pyramids of this process's images.
    classes, ipc : int
        Of all images.
    group : Group
        The processes that share them.
    """
    counts = [len(range(share.start, min(share.stop, CLASSES))) for share in group.shares(classes)]
    own = slice(0, counts[group.rank] * ipc, ipc)
    return [group.collected(level.detach()[own], counts) for level in levels]


def write_sheet(folder: Path, step: int, levels: Sequence[Tensor], canvas: int) -> None:
    """Write ``folder/step_<n>.png``: images side by side.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    step : int
        Steps done.
    levels : sequence of Tensor, shapes (N, 3, r, r)
        See :func:`first_images`.
    canvas : int
        Side of the images, in pixels; tiles are at most 64.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    side = min(canvas, TILE)
    sheet = Image.new("RGB", (len(levels[0]) * side, side))
    for place, image in enumerate(pixels(levels, canvas)):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (place * side, 0))
    data = BytesIO()
    sheet.save(data, "PNG", optimize=True)
    with writing(folder):
        make_folder(folder)
    write_file(folder / f"step_{step:08d}.png", data.getvalue())
