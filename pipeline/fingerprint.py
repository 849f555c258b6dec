"""The dataset fingerprint: which images were used, whatever their folder, order or file names."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sfm.stats_store.digests import encode_canonical_json, compute_sha256

MODULUS = 2**256


def sample_digest(data: bytes) -> bytes:
    """Return the SHA-256 of a sample's length (8 bytes, little-endian) and encoded bytes."""
    return hashlib.sha256(len(data).to_bytes(8, "little") + data).digest()


class Tally:
    """Counts and digest sums per (split, class): everything the fingerprint needs, in any order.

    Sums modulo 2^256 commute, so samples may be added in any order and by any number of workers.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], tuple[int, int]] = {}

    def add(
        self,
        split: str,
        class_ids: Sequence[str],
        labels: npt.NDArray[np.int32],
        digests: npt.NDArray[np.uint8],
    ) -> None:
        """Add samples.

        Parameters
        ----------
        split : str
        class_ids : sequence of str
        labels : ndarray of int32, shape (n,)
            Indices into `class_ids`.
        digests : ndarray of uint8, shape (n, 32)
            One :func:`sample_digest` per sample.
        """
        for label, digest in zip(labels.tolist(), digests, strict=True):
            key = (split, class_ids[label])
            count, total = self._sums.get(key, (0, 0))
            self._sums[key] = (count + 1, (total + int.from_bytes(digest.tobytes(), "big")) % MODULUS)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hexadecimal) of all counts and sums, sorted by split and class id."""
        rows = [[*key, count, f"{total:064x}"] for key, (count, total) in sorted(self._sums.items())]
        return compute_sha256(encode_canonical_json(rows))
