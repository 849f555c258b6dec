"""One labelled image of a dataset: its encoded bytes, or the file that holds them."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

from sfm.errors import InputError
from sfm.pipeline.sources.limits import MAX_IMAGE_BYTES, MAX_PREFETCH_BYTES
from sfm.untrusted_files import OversizeError, read_bounded_file

VANISHED_MESSAGE = "{} vanished while the dataset was read; run again"


@dataclass(frozen=True)
class Sample:
    """One labelled image as it is stored.

    Attributes
    ----------
    data : bytes
        Encoded.
    label : str
        Id of its class.
    where : str
        Names it for a person, e.g. its path.
    label_text : str
        How its label is written, where that is a number; "" where it does not matter.
    fault : str
        Why it was not read, though it is there: it counts as one that cannot be decoded.
    """

    data: bytes
    label: str
    where: str
    label_text: str = ""
    fault: str = ""

    def read(self) -> "Sample":
        """Return the sample, which is read already."""
        return self


@final
@dataclass(frozen=True)
class SampleFile:
    """A labelled image that is a file of its own, not read yet; who decodes it reads it, maybe elsewhere.

    Attributes
    ----------
    where : str
        Its path.
    label : str
        Id of its class.
    """

    where: str
    label: str

    def read(self) -> Sample:
        """Return the sample; a file that is larger than any image is not read, which the sample tells.

        Raises
        ------
        InputError
            If the file cannot be read.
        """
        return self.read_if_smaller(MAX_IMAGE_BYTES) or Sample(
            b"", self.label, self.where, fault=describe_oversized_image()
        )

    def prefetch(self) -> "Sample | SampleFile":
        """Return the sample before it is its turn; a large file as it is, since memory holds many of them."""
        return self.read_if_smaller(MAX_PREFETCH_BYTES) or self

    def read_if_smaller(self, max_bytes: int) -> Sample | None:
        """Return the sample, or None if it has more than so many bytes."""
        try:
            return Sample(read_bounded_file(Path(self.where), max_bytes), self.label, self.where)
        except OversizeError:
            return None
        except FileNotFoundError as error:
            raise InputError(VANISHED_MESSAGE.format(self.where)) from error
        except OSError as error:
            raise InputError(f"cannot read {self.where}: {error.strerror or error}") from error


def describe_oversized_image(size: int | None = None) -> str:
    """Return what is wrong with an image that is not read."""
    return f"{'' if size is None else f'{size:,} bytes: '}more than {MAX_IMAGE_BYTES:,} bytes are no image"
