"""The distilled images as files: what is shipped, and therefore what is evaluated."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sfm.config_fields import MAX_CANVAS_PIXELS
from sfm.distill.captions import short_captions
from sfm.distill.pyramid import decode
from sfm.image_files import read_png
from sfm.text import sanitize_line

DECODED_AT_ONCE = 64

PREVIEWED_CLASSES, PREVIEWED_IMAGES = 100, 10
"""How many classes a preview shows, and how many images of each."""

CAPTION = 200
"""Characters of a caption that are looked at; fewer are drawn, as many as fit."""


def pixels(levels: Sequence[Tensor], canvas: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the images of pyramids one by one as 8-bit arrays of shape (canvas, canvas, 3).

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
    canvas : int
        Side of the images, in pixels.
    """
    for start in range(0, len(levels[0]), DECODED_AT_ONCE):
        with torch.no_grad():
            images = decode([level[start : start + DECODED_AT_ONCE] for level in levels], canvas)
        yield from (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def slug(name: str) -> str:
    """Reduce a name to ASCII letters, digits and dashes, at most 48: "T-shirt/top" -> "t-shirt-top"."""
    plain = unicodedata.normalize("NFKD", name.casefold()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:48].rstrip("-")


def class_folders(class_ids: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Name a folder per class such that sorting the names keeps the order of the classes.

    A name without a single ASCII letter or digit gives way to the class id, and that to the index alone.
    """
    width = len(str(len(class_ids) - 1))
    words = [slug(name) or slug(id_) for id_, name in zip(class_ids, class_names, strict=True)]
    return [f"{index:0{width}d}_{word}".rstrip("_") for index, word in enumerate(words)]


def write_images(
    folder: Path, images: Iterator[npt.NDArray[np.uint8]], folders: Sequence[str], ipc: int
) -> None:
    """Write images as ``folder/<class>/<i>.png``, 8-bit RGB.

    Parameters
    ----------
    folder : Path
        Where the classes' folders are made.
    images : iterator of ndarray of uint8, shape (side, side, 3)
        The `ipc` images of the first class, then those of the second, ...
    folders : sequence of str
        Names of the classes' folders.
    ipc : int
        Images per class.
    """
    width = len(str(ipc - 1))
    for name in folders:
        (folder / name).mkdir()
        for index in range(ipc):
            Image.fromarray(next(images)).save(folder / name / f"{index:0{width}d}.png")


def preview(folder: Path, folders: Sequence[str], labels: Sequence[str], title: str) -> bytes:
    """Draw a labelled sheet of written images.

    One image per class: a grid, labels below. More: a row per class, its first 10 images, label at the left.

    Parameters
    ----------
    folder : Path
        What :func:`write_images` wrote.
    folders, labels : sequence of str
        The classes' folders and what to call them; the first 100 are shown. What all begin with is left out.
    title : str
        One line for the top.

    Returns
    -------
    bytes
        A PNG file.
    """
    shown = [sorted((folder / name).glob("*.png"))[:PREVIEWED_IMAGES] for name in folders[:PREVIEWED_CLASSES]]
    tile, gap, margin, text = 128, 12, 24, 15
    font, heading = ImageFont.load_default(text), ImageFont.load_default(20)
    top = margin + 20 + margin
    many = max(map(len, shown)) > 1
    if many:
        columns, rows, left, below = max(map(len, shown)), len(shown), margin + 150, 0
    else:
        columns = min(len(shown), 10 if len(shown) > 25 else 5)
        rows, left, below = -(-len(shown) // columns), margin, text + 9
    width = left + columns * (tile + gap) - gap + margin
    height = top + rows * (tile + below + gap) - gap + margin
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin), _fitted(title, heading, width - 2 * margin), "#111111", heading)
    for index, (paths, label) in enumerate(zip(shown, short_captions(labels), strict=False)):
        for place, path in enumerate(paths):
            row, column = (index, place) if many else divmod(index, columns)
            x, y = left + column * (tile + gap), top + row * (tile + below + gap)
            image = Image.fromarray(read_png(path, MAX_CANVAS_PIXELS**2))
            sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
        if many:
            name = _fitted(label, font, left - margin - gap)
            draw.text((left - gap, y + tile // 2), name, "#333333", font, anchor="rm")
        else:
            name = _fitted(label, font, tile)
            draw.text((x + tile // 2, y + tile + 6), name, "#333333", font, anchor="mt")
    data = BytesIO()
    sheet.save(data, "PNG", optimize=True)
    return data.getvalue()


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    text = sanitize_line(text, CAPTION)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
