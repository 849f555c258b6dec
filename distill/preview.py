"""Contact sheets: ``preview.png`` of the result, ``growth/`` of earlier steps."""

import os
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sfm.atomic import make_folder_refusing_link
from sfm.config_fields import MAX_CANVAS_PIXELS
from sfm.distill.distilled_images import iterate_decoded_pixels
from sfm.distill.process_group import SINGLE_PROCESS, ProcessGroup
from sfm.distill.run_files import translate_run_write_errors, write_run_file
from sfm.image_files import read_png_as_rgb
from sfm.text import sanitize_line

SHEET_CLASSES, MAX_TILE_PIXELS = 10, 64
"""Number of classes in a growth sheet, and maximum side of an image in it, in pixels."""

MAX_PREVIEW_CLASSES, MAX_PREVIEW_IMAGES = 100, 10
"""Maximum numbers of classes in a preview, and of images per class."""

MAX_CAPTION_CHARACTERS = 200
"""Maximum length of a caption before it is cut to the width of its tile."""


def gather_growth_sheet_levels(
    levels: Sequence[Tensor], class_count: int, images_per_class: int, group: ProcessGroup = SINGLE_PROCESS
) -> list[Tensor]:
    """Return the pyramids of a growth sheet, in the first process: the first image of the first ten classes.

    Parameters
    ----------
    levels : sequence of Tensor, shapes (N, 3, r, r)
        The pyramids of this process's images.
    class_count, images_per_class : int
        Of all images.
    group : ProcessGroup
        The processes that share them.
    """
    counts = [len(range(rows.start, min(rows.stop, SHEET_CLASSES))) for rows in group.split_rows(class_count)]
    own_rows = slice(0, counts[group.rank] * images_per_class, images_per_class)
    return [group.gather_to_rank0(level.detach()[own_rows], counts) for level in levels]


def write_growth_sheet(
    folder: Path, step: int, levels: Sequence[Tensor], canvas_pixels: int, color_decorrelation: bool = True
) -> None:
    """Write ``folder/step_<n>.png``: images side by side.

    Parameters
    ----------
    folder : Path
        Created unless it exists.
    step : int
        Steps done.
    levels : sequence of Tensor, shapes (N, 3, r, r)
        See :func:`gather_growth_sheet_levels`.
    canvas_pixels : int
        Side of the images, in pixels; tiles have at most 64.
    color_decorrelation : bool
        See :func:`decode_pyramid`.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    side = min(canvas_pixels, MAX_TILE_PIXELS)
    sheet = Image.new("RGB", (len(levels[0]) * side, side))
    for column, image in enumerate(iterate_decoded_pixels(levels, canvas_pixels, color_decorrelation)):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (column * side, 0))
    data = BytesIO()
    sheet.save(data, "PNG", optimize=True)
    with translate_run_write_errors(folder):
        make_folder_refusing_link(folder)
    write_run_file(folder / f"step_{step:08d}.png", data.getvalue())


def draw_preview_png(
    images_folder: Path, class_folder_names: Sequence[str], class_labels: Sequence[str], title: str
) -> bytes:
    """Draw a labelled sheet of written images.

    With one image per class it is a grid with labels below; with more, a row per class of its first 10 images
    with the label at the left.

    Parameters
    ----------
    images_folder : Path
        Folder that :func:`write_images` wrote.
    class_folder_names, class_labels : sequence of str
        The classes' folders and names; the first 100 are drawn, without common prefixes.
    title : str
        One line for the top.

    Returns
    -------
    bytes
        A PNG file.
    """
    shown = [
        sorted((images_folder / name).glob("*.png"))[:MAX_PREVIEW_IMAGES]
        for name in class_folder_names[:MAX_PREVIEW_CLASSES]
    ]
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
    draw.text((margin, margin), _shorten_to_width(title, heading, width - 2 * margin), "#111111", heading)
    for index, (paths, label) in enumerate(
        zip(shown, strip_numbers_and_common_prefix(class_labels), strict=False)
    ):
        for place, path in enumerate(paths):
            row, column = (index, place) if many else divmod(index, columns)
            x, y = left + column * (tile + gap), top + row * (tile + below + gap)
            image = Image.fromarray(read_png_as_rgb(path, MAX_CANVAS_PIXELS**2))
            sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
        if many:
            name = _shorten_to_width(label, font, left - margin - gap)
            draw.text((left - gap, y + tile // 2), name, "#333333", font, anchor="rm")
        else:
            name = _shorten_to_width(label, font, tile)
            draw.text((x + tile // 2, y + tile + 6), name, "#333333", font, anchor="mt")
    data = BytesIO()
    sheet.save(data, "PNG", optimize=True)
    return data.getvalue()


def _shorten_to_width(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, max_width_pixels: int
) -> str:
    text = sanitize_line(text, MAX_CAPTION_CHARACTERS)
    if font.getlength(text) <= max_width_pixels:
        return text
    while text and font.getlength(text + "…") > max_width_pixels:
        text = text[:-1]
    return text.rstrip() + "…"


def strip_numbers_and_common_prefix(names: Sequence[str]) -> list[str]:
    """Remove leading numbers and the words that all names begin with.

    "001.Black_footed_Albatross", "002.Laysan_Albatross" become "Black_footed_Albatross", "Laysan_Albatross";
    "bird/owl", "bird/crow" become "owl", "crow". Names that would be empty or less distinct stay as they are.
    """
    unnumbered = [re.sub(r"^\d+[\s._\-/]+", "", name) for name in names]
    numbered = all(re.match(r"\d+[\s._\-/]+", name) for name in names)
    shortest = unnumbered if numbered and are_nonempty_and_as_distinct(unnumbered, names) else list(names)
    shared = re.match(r".*[^\w]|.*_|", os.path.commonprefix(shortest), re.DOTALL)  # noqa: RUF071
    shortened = [name[shared.end() if shared else 0 :] for name in shortest]
    return shortened if are_nonempty_and_as_distinct(shortened, names) else shortest


def are_nonempty_and_as_distinct(shortened_names: Sequence[str], full_names: Sequence[str]) -> bool:
    """Return whether shortened names are as distinct as the full names, and none is empty."""
    return len(full_names) > 1 and all(shortened_names) and len(set(shortened_names)) == len(set(full_names))
