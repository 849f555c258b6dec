"""Limits on untrusted parts of a dataset, checked before memory is allocated.

Every limit is far above the sizes in real datasets (docs/sources.md).
"""

import json
from collections.abc import Sequence

from sfm.constrained_types import MAX_NAME_LENGTH
from sfm.errors import InputError
from sfm.text import sanitize_line
from sfm.untrusted_files import MAX_JSON_BYTES

MAX_IMAGE_BYTES = 2**29
"""Encoded image: as large as the pixels of the largest decoded image, 89 million of 3 x 16 bits."""

MAX_LABEL_BYTES = MAX_JSON_BYTES
"""Label, caption or JSON description in a shard."""

MAX_MEMBER_GROUP_BYTES = 2 * MAX_IMAGE_BYTES
"""All images and labels in a shard that share a name up to the first dot."""

MAX_PREFETCH_BYTES = 2**23
"""A prefetched file."""

MAX_BATCH_BYTES = 2**28
"""Encoded images of a full batch, and of buffered samples with dotted names."""

MAX_QUEUED_BYTES = 2**30
"""Encoded images of all batches that wait for a worker."""

MAX_HEADER_BYTES = 2**22
"""Tar headers of a member, such as a long name, and global headers of an archive."""

MAX_PATH_CHARACTERS = 4096
"""Name of a member of a shard: the longest path on a disk."""

MAX_MEMBERS = 10_000_000
"""Members of a shard, and labels of an idx file."""

MAX_NAME_CHARACTERS = MAX_NAME_LENGTH
"""Id or display name of a class."""

MAX_CLASSES_BYTES = 2**23
"""Ids and names of all classes as JSON: every card of an entry holds them."""


def require_short_class_name(name: str, location: str) -> str:
    """Return the id or name of a class; refuse one that is too long.

    Raises
    ------
    InputError
        With the location and the beginning of the name.
    """
    if len(name) > MAX_NAME_CHARACTERS:
        raise InputError(
            f"{location} has a class name of {len(name):,} characters ({sanitize_line(name, 40)}): at most "
            f"{MAX_NAME_CHARACTERS:,} are read"
        )
    return name


def require_class_names_within_limits(
    class_ids: Sequence[str], class_names: Sequence[str] | None, location: str
) -> None:
    """Refuse classes whose ids and names, one of them or all together, are too long for an entry's card.

    Raises
    ------
    InputError
        With the name or the number of classes.
    """
    size = 0
    for name in (*class_ids, *(class_names or ())):
        size += len(json.dumps(require_short_class_name(name, location))) + 2
    size *= 1 if class_names else 2
    if size > MAX_CLASSES_BYTES:
        raise InputError(
            f"{location} has {len(class_ids):,} classes, whose names take {size:,} bytes: at most "
            f"{MAX_CLASSES_BYTES:,} are kept; choose some with ?classes=LIST"
        )
