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
        The encoded image.
    class_id : str
        Class id.
    location : str
        Location of the sample, for messages: a path, a key in a shard, a row of a table.
    numeric_label_text : str
        The label as the dataset writes it, if it is a number; "" where the spelling does not matter.
    fault : str
        Reason why an existing image was not read; such a sample counts as undecodable.
    """

    data: bytes
    class_id: str
    location: str
    numeric_label_text: str = ""
    fault: str = ""

    def read(self) -> "Sample":
        """Return the sample itself; the counterpart of :meth:`SampleFile.read`."""
        return self


@final
@dataclass(frozen=True)
class SampleFile:
    """A labelled image file that has not been read yet; the decoding process reads it.

    Attributes
    ----------
    location : str
        Path of the file.
    class_id : str
        Class id.
    """

    location: str
    class_id: str

    def read(self) -> Sample:
        """Return the sample; one with a `fault` and no data if the file is larger than any image.

        Raises
        ------
        InputError
            If the file cannot be read.
        """
        fault = describe_oversized_image_fault()
        return self.read_if_at_most(MAX_IMAGE_BYTES) or Sample(b"", self.class_id, self.location, fault=fault)

    def read_if_small(self) -> "Sample | SampleFile":
        """Return the sample, or the unread file if it is large: memory holds many prefetched samples."""
        return self.read_if_at_most(MAX_PREFETCH_BYTES) or self

    def read_if_at_most(self, max_bytes: int) -> Sample | None:
        """Return the sample, or None if the file has more than `max_bytes` bytes."""
        try:
            return Sample(read_bounded_file(Path(self.location), max_bytes), self.class_id, self.location)
        except OversizeError:
            return None
        except FileNotFoundError as error:
            raise InputError(VANISHED_MESSAGE.format(self.location)) from error
        except OSError as error:
            raise InputError(f"cannot read {self.location}: {error.strerror or error}") from error


def describe_oversized_image_fault(size_bytes: int | None = None) -> str:
    """Return the error message for an image that is too large."""
    prefix = "" if size_bytes is None else f"{size_bytes:,} bytes: "
    return f"{prefix}more than {MAX_IMAGE_BYTES:,} bytes are no image"
