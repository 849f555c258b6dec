"""Dataset fingerprints: digests of the images used, independent of folder, order and file names."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sfm.stats_store.digests import compute_sha256, encode_canonical_json

DIGEST_MODULUS = 2**256


def digest_sample(data: bytes) -> bytes:
    """Return the SHA-256 of a sample's length (8 bytes, little-endian) and encoded bytes."""
    return hashlib.sha256(len(data).to_bytes(8, "little") + data).digest()


class FingerprintBuilder:
    """Sums counts and digests per (split, class) into a fingerprint.

    Sums modulo 2^256 commute: samples may be added in any order and by any number of workers.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], tuple[int, int]] = {}

    def add_samples(
        self,
        split: str,
        class_ids: Sequence[str],
        labels: npt.NDArray[np.int32],
        sample_digests: npt.NDArray[np.uint8],
    ) -> None:
        """Add samples of a split.

        Parameters
        ----------
        split : str
        class_ids : sequence of str
        labels : ndarray of int32, shape (n,)
            Indices into `class_ids`.
        sample_digests : ndarray of uint8, shape (n, 32)
            One :func:`digest_sample` per sample.
        """
        for label, digest in zip(labels.tolist(), sample_digests, strict=True):
            key = (split, class_ids[label])
            count, total = self._sums.get(key, (0, 0))
            self._sums[key] = (count + 1, (total + int.from_bytes(digest.tobytes(), "big")) % DIGEST_MODULUS)

    def compute_fingerprint(self) -> str:
        """Return the fingerprint: SHA-256 (hexadecimal) of all counts and sums, by split and class id."""
        rows = [[*key, count, f"{total:064x}"] for key, (count, total) in sorted(self._sums.items())]
        return compute_sha256(encode_canonical_json(rows))
