"""Fixtures of the offline stage's tests: an S3 server, and one set of pictures in every kind of container."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from s3_server import s3_endpoint, s3_url

from sfm.pipeline.sources import open_source

__all__ = ["Picture", "pictures", "s3_endpoint", "s3_url"]

CLASSES = {8: "bag", 9: "boot", 1: "trouser"}


@dataclass(frozen=True)
class Picture:
    """An image file and its class."""

    split: str
    class_id: str
    number: int
    data: bytes

    @property
    def label(self) -> int:
        """The position of the class in alphabetical order."""
        return sorted(CLASSES.values()).index(self.class_id)


@pytest.fixture(scope="session")
def pictures() -> list[Picture]:
    """108 real images as PNG files: of three classes, 24 for training and 12 held out each; shuffled."""
    source = open_source("builtin:fashion-mnist-6k")
    found = []
    for name, split, count in (("train", source.train, 24), ("test", source.test, 12)):
        for label, class_id in CLASSES.items():
            rows = np.flatnonzero(split.labels == label)[:count]
            for number, sample in enumerate(split.read(rows)):
                file = io.BytesIO()
                source.decode(sample.data).save(file, "PNG")
                found.append(Picture(name, class_id, number, file.getvalue()))
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


@pytest.fixture
def class_file(tmp_path: Path) -> Path:
    """What the label numbers of the pictures mean."""
    file = tmp_path / "garments.txt"
    file.write_text("# garments\nbag\tHandbag\nboot\tAnkle boot\ntrouser\n")
    return file
