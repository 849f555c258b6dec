"""What a source of the test pictures holds."""

from collections.abc import Sequence


def group_samples_by_split(pictures: Sequence) -> dict[str, list[tuple[str, bytes]]]:
    """Class id and encoded bytes of every picture, by split."""
    return {
        split: [(picture.class_id, picture.data) for picture in pictures if picture.split == split]
        for split in ("train", "test")
    }
