"""The images to train on: the distilled ones, and the real ones that stand beside them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfm.backbones.build import Backbone
from sfm.backbones.crops import make_centre_crops
from sfm.eval.baselines import (
    NEAREST,
    NONE,
    RANDOM,
    fewest,
    nearest_exemplars,
    neighbours,
    random_exemplars,
)
from sfm.eval.config import EvaluateConfig
from sfm.eval.part import Part
from sfm.eval.pool import LabelledImages, features_of_views
from sfm.eval.result import Images
from sfm.eval.synthetic import DistilledRun
from sfm.eval.work import Work


@dataclass(frozen=True)
class ImageSet:
    """Images to train on.

    Attributes
    ----------
    name : Images
    images : LabelledImages
        Those of the first seed, then those of the second, ..., or the same for all seeds.
    sharing : int
        How many seeds train on each image: all, or one.
    exemplars : int or None
        Of how many real images per class they were chosen, of the class that has fewest.
    chosen : list of list of int or None
        Which exemplars they are, by class, where that follows from the distilled images.
    """

    name: Images
    images: LabelledImages
    sharing: int
    exemplars: int | None = None
    chosen: list[list[int]] | None = None


@dataclass(frozen=True)
class Exemplars:
    """The real images of an entry.

    Attributes
    ----------
    role : ndarray of uint8, shape (class, exemplar)
    pixels : ndarray of uint8, shape (class, exemplar, y, x, channel)
    """

    role: npt.NDArray[np.uint8]
    pixels: npt.NDArray[np.uint8]

    @property
    def held(self) -> int:
        """How many the class has that has fewest."""
        return int((self.role != NONE).sum(axis=1).min())

    def chosen(self, places: npt.NDArray[np.int64]) -> LabelledImages:
        """Return the exemplars at some places: shape (class, image), or (draw, class, image)."""
        classes = np.arange(len(self.role))
        labels = np.broadcast_to(classes[:, None], places.shape).flatten()
        pixels = self.pixels[classes[:, None], places]
        return LabelledImages(pixels.reshape(-1, *pixels.shape[-3:]), labels)


def exemplars_of(part: Part) -> Exemplars | None:
    """Read the real images of an entry, if it holds any."""
    if "exemplar/role" not in part.entry:
        return None
    return Exemplars(part.read("exemplar/role"), part.read("exemplar/image"))


def real_images(
    exemplars: Exemplars | None, ipc: int, config: EvaluateConfig
) -> tuple[list[ImageSet], list[str]]:
    """Choose as many real images per class as were distilled, from the exemplars of the run's entry.

    Returns
    -------
    list of ImageSet
        ``random`` and ``nearest``, as far as there are enough exemplars.
    list of str
        What is missing, and why.
    """
    if exemplars is None:
        return [], ["No real images to compare with: the store keeps no exemplars (sfm extract --exemplars)."]
    role = exemplars.role
    sets, notes = [], []
    held = fewest(role, RANDOM)
    if held >= ipc:
        drawn = exemplars.chosen(random_exemplars(role, ipc, config.seeds, config.seed))
        sets.append(ImageSet("random", drawn, 1, held))
        if held < ipc * config.seeds:
            notes.append(
                f"The {config.seeds} random draws share images: the store keeps {held} random exemplars of "
                f"some class."
            )
    else:
        notes.append(f"No random real images: some class has {held} such exemplars, {ipc} are needed.")
    held = fewest(role, NEAREST)
    if held >= ipc:
        sets.append(ImageSet("nearest", exemplars.chosen(nearest_exemplars(role, ipc)), config.seeds, held))
    else:
        notes.append(f"No real images nearest to the mean: some class has {held}, {ipc} are needed.")
    return sets, notes


def neighbours_of(
    run: DistilledRun,
    exemplars: Exemplars | None,
    backbone: Backbone,
    config: EvaluateConfig,
    work: Work | None = None,
) -> list[ImageSet]:
    """Choose the exemplars that are nearest to the distilled images, as a backbone sees their centres.

    Returns
    -------
    list of ImageSet
        One, or none where there are too few exemplars.
    """
    ipc = run.record.ipc
    if exemplars is None or exemplars.held < ipc:
        return []
    classes, side = exemplars.role.shape[0], exemplars.pixels.shape[2]
    inner = min(run.record.image_size, run.record.canvas)
    of_exemplars = features_of_views(
        backbone,
        LabelledImages(
            exemplars.pixels.reshape(-1, side, side, 3),
            np.repeat(np.arange(classes), exemplars.role.shape[1]),
        ),
        make_centre_crops(exemplars.role.size, side, side),
        work=work,
    )
    of_distilled = features_of_views(
        backbone,
        LabelledImages(run.pixels, run.labels),
        make_centre_crops(len(run.pixels), run.record.canvas, inner),
        work=work,
    )
    places = neighbours(
        exemplars.role,
        of_exemplars.cpu().numpy().reshape(*exemplars.role.shape, -1),
        of_distilled.cpu().numpy().reshape(classes, ipc, -1),
    )
    return [ImageSet("neighbour", exemplars.chosen(places), config.seeds, exemplars.held, places.tolist())]
