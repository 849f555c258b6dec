"""Foreign images: labelled images that another program made, as their reader hands them to the evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ForeignImages:
    """Labelled images that another program made, resized to a canvas.

    Attributes
    ----------
    pixels : ndarray of uint8, shape (image, canvas, canvas, 3)
    class_labels : list of str
        The class of every image as it is written there: a folder name, a class id or a number.
    source_digest : str
        SHA-256 of images and labels before resizing.
    notes : list of str
        Sentences about what was read, and what was done to the images.
    """

    pixels: npt.NDArray[np.uint8]
    class_labels: list[str]
    source_digest: str
    notes: list[str]


ReadForeignImages = Callable[[Path, int], ForeignImages]
"""Reads the images at a path and resizes them to a canvas of so many pixels; raises InputError."""
