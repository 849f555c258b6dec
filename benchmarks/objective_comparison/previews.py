"""Previews of several runs on one sheet."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CAPTION_HEIGHT, GAP = 40, 24


def draw_previews_side_by_side(captioned_previews: Sequence[tuple[str, Path]], out: Path) -> None:
    """Write a sheet with the previews of runs side by side, each below its caption.

    Parameters
    ----------
    captioned_previews : sequence of (str, Path)
        Caption and ``preview.png`` of every run.
    out : Path
        The PNG file to write.
    """
    sheets = []
    for _, path in captioned_previews:
        with Image.open(path) as image:
            sheets.append(image.convert("RGB"))
    width = sum(sheet.width for sheet in sheets) + GAP * (len(sheets) - 1)
    whole = Image.new("RGB", (width, CAPTION_HEIGHT + max(sheet.height for sheet in sheets)), "white")
    draw, left = ImageDraw.Draw(whole), 0
    for (caption, _), sheet in zip(captioned_previews, sheets, strict=True):
        draw.text((left + GAP, GAP // 2), caption, "#111111", ImageFont.load_default(20))
        whole.paste(sheet, (left, CAPTION_HEIGHT))
        left += sheet.width + GAP
    out.parent.mkdir(parents=True, exist_ok=True)
    whole.save(out, "PNG", optimize=True)
