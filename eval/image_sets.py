"""Image sets to train on: the distilled images, and baselines of real images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sfm.backbones.build import Backbone
from sfm.backbones.crops import make_centre_crops
from sfm.eval.baselines import (
    ExemplarIndices,
    ExemplarRoles,
    choose_exemplars_nearest_to_distilled,
    count_min_exemplars_per_class,
    draw_random_exemplar_indices,
    select_exemplars_with_nearest_role,
)
from sfm.eval.class_subset import EMPTY_ROLE, NEAREST_ROLE, RANDOM_ROLE, ClassSubsetStatistics
from sfm.eval.config import EvaluateConfig
from sfm.eval.distilled_run import DistilledRun
from sfm.eval.result import ImageSetName, NoteText
from sfm.eval.view_features import LabelledImages, compute_view_features
from sfm.eval.work_folder import WorkFolder


@dataclass(frozen=True)
class ImageSet:
    """Images to train on.

    Attributes
    ----------
    name : ImageSetName
    images : LabelledImages
        The images of the first seed, then those of the second, ..., or the same for all seeds.
    seeds_per_image : int
        Number of seeds that train on each image: all, or one.
    min_exemplars_per_class : int or None
        Of real images: smallest number of exemplars per class to choose from.
    exemplar_indices_by_class : list of list of int or None
        Which exemplars they are, by class, where that follows from the distilled images.
    """

    name: ImageSetName
    images: LabelledImages
    seeds_per_image: int
    min_available_exemplars_per_class: int | None = None
    exemplar_indices_by_class: list[list[int]] | None = None


@dataclass(frozen=True)
class Exemplars:
    """The real images that an entry keeps.

    Attributes
    ----------
    roles : ndarray of uint8, shape (class, exemplar)
    pixels : ndarray of uint8, shape (class, exemplar, y, x, channel)
    """

    roles: ExemplarRoles
    pixels: npt.NDArray[np.uint8]

    @property
    def count_per_class(self) -> npt.NDArray[np.int64]:
        """Number of exemplars of every class."""
        counts: npt.NDArray[np.int64] = (self.roles != EMPTY_ROLE).sum(axis=1)
        return counts

    def count_of_role(self, role: int) -> npt.NDArray[np.int64]:
        """Return the number of exemplars of a role, shape (class,)."""
        counts: npt.NDArray[np.int64] = (self.roles == role).sum(axis=1)
        return counts

    def select_images(self, indices: ExemplarIndices, images_per_class: Sequence[int]) -> LabelledImages:
        """Return the exemplars at indices of shape (class, image) or (draw, class, image).

        Of every class the first `images_per_class` indices count.
        """
        classes = np.arange(len(self.roles))
        is_used = np.arange(indices.shape[-1]) < np.array(images_per_class)[:, None]
        is_used = np.broadcast_to(is_used, indices.shape)
        labels = np.broadcast_to(classes[:, None], indices.shape)[is_used]
        return LabelledImages(self.pixels[labels, indices[is_used]], labels)


def read_exemplars(statistics: ClassSubsetStatistics) -> Exemplars | None:
    """Read the real images of an entry's classes; None if it keeps none."""
    if "exemplar/role" not in statistics.entry:
        return None
    return Exemplars(
        statistics.read_per_class_array("exemplar/role"), statistics.read_per_class_array("exemplar/image")
    )


def make_random_and_nearest_image_sets(
    exemplars: Exemplars | None, images_per_class: Sequence[int], config: EvaluateConfig
) -> tuple[list[ImageSet], list[NoteText]]:
    """Choose as many real images of every class as were distilled, from the exemplars of the run's entry.

    Parameters
    ----------
    exemplars : Exemplars or None
    images_per_class : sequence of int
        Number of distilled images of every class.
    config : EvaluateConfig

    Returns
    -------
    list of ImageSet
        ``random`` and ``nearest``, where there are enough exemplars.
    list of str
        Notes about missing image sets, with the reason.
    """
    if exemplars is None:
        return [], ["No real images to compare with: the store keeps no exemplars (sfm extract --exemplars)."]
    roles, ipc = exemplars.roles, max(images_per_class)
    image_sets, notes = [], []
    available = count_min_exemplars_per_class(roles, RANDOM_ROLE)
    if (exemplars.count_of_role(RANDOM_ROLE) >= images_per_class).all():
        indices = draw_random_exemplar_indices(roles, ipc, config.seeds, config.seed)
        image_sets.append(
            ImageSet("random", exemplars.select_images(indices, images_per_class), 1, available)
        )
        if (exemplars.count_of_role(RANDOM_ROLE) < np.array(images_per_class) * config.seeds).any():
            notes.append(
                f"The {config.seeds} random draws share images: the store keeps {available} random "
                f"exemplars of some class."
            )
    else:
        notes.append(f"No random real images: some class has {available} such exemplars, {ipc} are needed.")
    available = count_min_exemplars_per_class(roles, NEAREST_ROLE)
    if (exemplars.count_of_role(NEAREST_ROLE) >= images_per_class).all():
        indices = select_exemplars_with_nearest_role(roles, ipc)
        nearest = exemplars.select_images(indices, images_per_class)
        image_sets.append(ImageSet("nearest", nearest, config.seeds, available))
    else:
        notes.append(f"No real images nearest to the mean: some class has {available}, {ipc} are needed.")
    return image_sets, notes


def make_neighbour_image_set(
    run: DistilledRun,
    exemplars: Exemplars | None,
    backbone: Backbone,
    config: EvaluateConfig,
    work_folder: WorkFolder | None = None,
) -> ImageSet | None:
    """Choose the exemplars nearest to the distilled images, by a backbone's features of centre crops.

    Returns
    -------
    ImageSet or None
        None where there are too few exemplars.
    """
    images_per_class = run.images_per_class
    if exemplars is None or (exemplars.count_per_class < images_per_class).any():
        return None
    class_count, side = exemplars.roles.shape[0], exemplars.pixels.shape[2]
    crop_side = min(run.record.largest_image_size, run.record.canvas)
    exemplar_features = compute_view_features(
        backbone,
        LabelledImages(
            exemplars.pixels.reshape(-1, side, side, 3),
            np.repeat(np.arange(class_count), exemplars.roles.shape[1]),
        ),
        make_centre_crops(exemplars.roles.size, side, side),
        work_folder=work_folder,
    )
    distilled_features = compute_view_features(
        backbone,
        LabelledImages(run.pixels, run.labels),
        make_centre_crops(len(run.pixels), run.record.canvas, crop_side),
        work_folder=work_folder,
    )
    indices = choose_exemplars_nearest_to_distilled(
        exemplars.roles != EMPTY_ROLE,
        exemplar_features.cpu().numpy().reshape(*exemplars.roles.shape, -1),
        pad_features_to_equal_counts(distilled_features.cpu().numpy().squeeze(1), images_per_class),
    )
    images = exemplars.select_images(indices, images_per_class)
    chosen = [row[:count] for row, count in zip(indices.tolist(), images_per_class, strict=True)]
    return ImageSet("neighbour", images, config.seeds, int(exemplars.count_per_class.min()), chosen)


def pad_features_to_equal_counts(
    features: npt.NDArray[np.float32], images_per_class: Sequence[int]
) -> npt.NDArray[np.float32]:
    """Return features by class, shape (class, image, feature); classes of fewer images end in zeros.

    Parameters
    ----------
    features : ndarray of float32, shape (image, feature)
        Of the images of the first class, then of the second, ...
    images_per_class : sequence of int
    """
    padded = np.zeros((len(images_per_class), max(images_per_class), features.shape[1]), np.float32)
    padded[np.arange(padded.shape[1]) < np.array(images_per_class)[:, None]] = features
    return padded
