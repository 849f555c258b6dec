r"""Make a dataset of class folders from Debian's package of clip art: drawings by subject, on white.

    apt-get install openclipart-png
    python benchmarks/clipart_dataset.py OUT [--clipart /usr/share/openclipart/png]

OUT gets train/ and test/ with a folder per class, which `sfm extract folder:OUT` reads.

- A class is a folder of the package that `CLASS_FOLDERS` lists, with the folders below it that are not listed
  themselves. Icons, unsorted drawings and small folders are not used.
- Drawings are put on white and scaled to fill a square of 256 px, so that no crop to a square cuts them. Of
  drawings with equal pixels one is kept, and none if they lie in several classes. Drawings too large for
  Pillow are not used.
- Drawings whose file names begin with the same words are a series: variants of one subject, often of one
  author. As many words count as leave a series at most a fifth of its class. A series is in one split, which
  the hash of its contents chooses, so no variant of a held-out drawing is in the training split.
- Classes with fewer than 40 drawings or fewer than 5 held-out ones are left out. The others are cut to 150.

The same package gives the same files. It prints the number of images of every class.
"""

import argparse
import hashlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measurement import log_progress
from PIL import Image, ImageChops, ImageOps

from sfm.atomic import atomic_folder

CLIPART_FOLDER = Path("/usr/share/openclipart/png")
IMAGE_SIDE = 256
MIN_PER_CLASS, MIN_HELD_OUT_PER_CLASS, MAX_PER_CLASS = 40, 5, 150
HELD_OUT_SHARE = 0.25


MAX_SERIES_SHARE = 0.2

CLASS_FOLDERS = (
    "animals",
    "animals/birds",
    "animals/bugs",
    "animals/mammals",
    "buildings",
    "computer/buttons",
    "computer/hardware",
    "education",
    "food",
    "food/beverages",
    "food/desserts",
    "food/fruit",
    "geography",
    "office",
    "people",
    "people/clothing",
    "people/smilies",
    "people/stickmen",
    "plants",
    "recreation/games/cards",
    "recreation/music",
    "recreation/party",
    "recreation/sports",
    "shapes/arrows",
    "shapes/stars",
    "signs_and_symbols/flags",
    "signs_and_symbols/led",
    "special/gradients",
    "special/patterns",
    "tools",
    "transportation",
    "transportation/aiga-symbols",
    "transportation/roadsigns",
)
"""Folders that are classes; a drawing belongs to the nearest one above it."""


@dataclass(frozen=True)
class Drawing:
    """A drawing of the package.

    Attributes
    ----------
    path : Path
    class_name : str
        Its folder, with dashes for slashes.
    digest : str
        SHA-256 of its pixels on white.
    """

    path: Path
    class_name: str
    digest: str


def render_drawing(path: Path) -> Image.Image:
    """Return a drawing in the middle of a white square that it fills, without its white margins.

    Raises
    ------
    Image.DecompressionBombWarning
        If it has more pixels than Pillow takes without a warning.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                drawn = image.convert("RGBA")
        except Image.DecompressionBombError as error:
            raise Image.DecompressionBombWarning(str(error)) from error
    on_white = Image.new("RGBA", drawn.size, "white")
    on_white.alpha_composite(drawn)
    whole = on_white.convert("RGB")
    inked = ImageChops.invert(whole).getbbox()
    scaled = ImageOps.contain(whole.crop(inked), (IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
    return ImageOps.pad(scaled, (IMAGE_SIDE, IMAGE_SIDE), color="white")


def list_drawings(clipart: Path) -> list[Drawing]:
    """Return the drawings of a folder and all below it, without repeated and ambiguous ones.

    Of drawings with equal pixels the first one is kept, and none if they lie in several classes.
    """
    by_digest: dict[str, list[Drawing]] = defaultdict(list)
    for path in sorted(clipart.rglob("*.png")):
        folder = find_class_folder(path.relative_to(clipart))
        if folder is None:
            continue
        try:
            digest = hashlib.sha256(render_drawing(path).tobytes()).hexdigest()
        except Image.DecompressionBombWarning as warning:
            log_progress(f"not used: {path}: {warning}")
            continue
        by_digest[digest].append(Drawing(path, folder.replace("/", "-"), digest))
    return [
        copies[0] for copies in by_digest.values() if len({drawing.class_name for drawing in copies}) == 1
    ]


def find_class_folder(path: Path) -> str | None:
    """Return the nearest folder above a drawing that is a class."""
    return next((str(folder) for folder in path.parents if str(folder) in CLASS_FOLDERS), None)


def name_series(drawings: Sequence[Drawing]) -> list[str]:
    """Return the series of every drawing: the words that its file name shares with its variants.

    "dog_01" and "dog_sleeping" are of the series "dog", unless more than a fifth of their class are dogs:
    then they are of "dog 01" and "dog sleeping".
    """
    words = [re.findall(r"[^\W\d_]+|\d+", drawing.path.stem.lower()) for drawing in drawings]
    class_sizes = Counter(drawing.class_name for drawing in drawings)
    prefix_sizes = Counter(
        (drawing.class_name, *own[:length])
        for drawing, own in zip(drawings, words, strict=True)
        for length in range(1, len(own) + 1)
    )

    def name_one(drawing: Drawing, own: list[str]) -> str:
        limit = MAX_SERIES_SHARE * class_sizes[drawing.class_name]
        lengths = (n for n in range(1, len(own)) if prefix_sizes[drawing.class_name, *own[:n]] <= limit)
        return " ".join(own[: next(lengths, len(own))])

    return [name_one(drawing, own) for drawing, own in zip(drawings, words, strict=True)]


def choose_splits(drawings: Sequence[Drawing]) -> dict[str, list[Drawing]]:
    """Return the drawings of the training and of the held-out split.

    A series goes to the split that the smallest digest of its drawings chooses, in all classes alike.
    """
    series_names = name_series(drawings)
    smallest: dict[str, str] = {}
    for drawing, series in zip(drawings, series_names, strict=True):
        smallest[series] = min(smallest.get(series, drawing.digest), drawing.digest)
    splits: dict[str, list[Drawing]] = {"train": [], "test": []}
    for drawing, series in zip(drawings, series_names, strict=True):
        # The smallest of several digests is small: hash it again for a uniform number.
        drawn = int(hashlib.sha256(smallest[series].encode()).hexdigest()[:8], 16) / 16**8
        splits["test" if drawn < HELD_OUT_SHARE else "train"].append(drawing)
    return splits


def select_classes(splits: dict[str, list[Drawing]]) -> dict[str, dict[str, list[Drawing]]]:
    """Return the drawings of every class that has enough of them, by class and split.

    Of a large class, those with the smallest digests are kept, as many of each split as its share.
    """
    classes: dict[str, dict[str, list[Drawing]]] = defaultdict(lambda: {split: [] for split in splits})
    for split, drawings in splits.items():
        for drawing in sorted(drawings, key=lambda each: each.digest):
            classes[drawing.class_name][split].append(drawing)
    selected = {}
    for name, by_split in sorted(classes.items()):
        count = sum(map(len, by_split.values()))
        if count < MIN_PER_CLASS or len(by_split["test"]) < MIN_HELD_OUT_PER_CLASS:
            continue
        kept_share = min(1.0, MAX_PER_CLASS / count)
        selected[name] = {split: own[: round(len(own) * kept_share)] for split, own in by_split.items()}
    return selected


def write_clipart_dataset(clipart: Path, out: Path) -> dict[str, dict[str, int]]:
    """Write the dataset, and return the numbers of images by class and split.

    The folder appears when it is complete.
    """
    if not clipart.is_dir():
        raise SystemExit(f"{clipart} is not there: install Debian's package openclipart-png")
    log_progress(f"reading the drawings of {clipart}")
    classes = select_classes(choose_splits(list_drawings(clipart)))
    with atomic_folder(out, replace=False) as folder:
        for name, by_split in classes.items():
            for split, drawings in by_split.items():
                (folder / split / name).mkdir(parents=True)
                for drawing in drawings:
                    file = f"{drawing.path.stem}-{drawing.digest[:8]}.png"
                    render_drawing(drawing.path).save(folder / split / name / file)
    return {name: {split: len(own) for split, own in each.items()} for name, each in classes.items()}


def main() -> None:
    """Write the dataset and print its numbers of images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--clipart", type=Path, default=CLIPART_FOLDER, help="folder of the drawings")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: give a new folder")
    counts = write_clipart_dataset(arguments.clipart, arguments.out)
    for name, by_split in counts.items():
        print(f"{name:40} {by_split['train']:5} train {by_split['test']:5} test")
    totals = [sum(each[split] for each in counts.values()) for split in ("train", "test")]
    print(f"{len(counts)} classes, {totals[0]} train, {totals[1]} test")


if __name__ == "__main__":
    main()
