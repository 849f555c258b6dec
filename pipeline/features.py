"""The one pass over the raw images: decode once, look through every backbone, stage the features."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sfm.backbones.build import Backbone
from sfm.backbones.card import Preprocessing
from sfm.backbones.preprocess import crop, to_tensor
from sfm.errors import InputError
from sfm.events import Listener, Progress
from sfm.pipeline.fingerprint import sample_digest
from sfm.pipeline.sources import Source
from sfm.pipeline.staging import Partition, Staging

BATCH = 64
DECODERS = 2
LOOK_AHEAD = 6


@dataclass(frozen=True)
class Batch:
    """Decoded samples, cropped once per distinct preprocessing.

    Attributes
    ----------
    samples : ndarray of int64, shape (n,)
        Indices into the split.
    pixels : dict of Preprocessing to ndarray of uint8, shape (n, size, size, 3)
    digests : ndarray of uint8, shape (n, 32)
    """

    samples: npt.NDArray[np.int64]
    pixels: dict[Preprocessing, npt.NDArray[np.uint8]]
    digests: npt.NDArray[np.uint8]


def decode_batch(
    source: Source, split: str, samples: npt.NDArray[np.int64], wanted: Sequence[Preprocessing]
) -> Batch:
    """Read and decode samples, each once.

    Raises
    ------
    InputError
        If one cannot be decoded; names it.
    """
    part = source.splits[split]
    pixels: dict[Preprocessing, list[npt.NDArray[np.uint8]]] = {p: [] for p in wanted}
    digests = []
    for i in samples.tolist():
        data = part.read(i)
        digests.append(np.frombuffer(sample_digest(data), dtype=np.uint8))
        try:
            image = source.decode(data)
            for preprocessing, rows in pixels.items():
                rows.append(crop(image, preprocessing))
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"cannot decode {part.where(i)}: {error}; repair or remove it") from error
    return Batch(samples, {p: np.stack(rows) for p, rows in pixels.items()}, np.stack(digests))


def decoded(
    source: Source, work: Sequence[tuple[Partition, Sequence[Preprocessing]]]
) -> Iterator[tuple[int, Batch]]:
    """Decode partitions ahead of their use; batches come in order and never span two partitions.

    Yields
    ------
    int, Batch
        Position in `work`, and a batch of at most ``BATCH`` samples.
    """
    tasks = (
        (position, partition.split, partition.samples[start : start + BATCH], wanted)
        for position, (partition, wanted) in enumerate(work)
        for start in range(0, len(partition.samples), BATCH)
    )
    waiting: deque[tuple[int, Future[Batch]]] = deque()
    with ThreadPoolExecutor(DECODERS, thread_name_prefix="decode") as pool:
        try:
            for position, split, samples, wanted in tasks:
                waiting.append((position, pool.submit(decode_batch, source, split, samples, wanted)))
                if len(waiting) > LOOK_AHEAD:
                    first, batch = waiting.popleft()
                    yield first, batch.result()
            while waiting:
                first, batch = waiting.popleft()
                yield first, batch.result()
        finally:
            for _, batch in waiting:
                batch.cancel()


@torch.inference_mode()
def features_of(backbone: Backbone, batch: Batch) -> npt.NDArray[np.float32]:
    """Return the features of a batch, float32, shape (n, D).

    Raises
    ------
    ValueError
        If a feature is not finite; the message holds the position in the batch.
    """
    images = to_tensor(batch.pixels[backbone.card.preprocessing]).to(backbone.device)
    rows: npt.NDArray[np.float32] = backbone.features(images).float().cpu().numpy()
    return rows


def require_finite(
    rows: npt.NDArray[np.float32], batch: Batch, split: str, source: Source, backbone: Backbone
) -> None:
    """Refuse features that are not numbers; names the first image they come from."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        where = source.splits[split].where(int(batch.samples[bad[0]]))
        raise InputError(
            f"{backbone.card.spec} gives features that are not finite for {where}: check the weights of the "
            f"backbone, or remove the image"
        )


@dataclass(frozen=True)
class Pass:
    """What the pass over the images cost.

    Attributes
    ----------
    read, resumed : int
        Images decoded in this pass, and images whose features were staged before.
    seconds : float
    """

    read: int
    resumed: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Images decoded per second of the pass; 0 if all were staged before."""
        return self.read / self.seconds if self.read else 0.0


def stage_features(
    source: Source,
    of: Sequence[Partition],
    backbones: Sequence[Backbone],
    staging: Staging,
    progress: Listener,
) -> Pass:
    """Extract the features of every partition that is not staged yet, with every backbone.

    Each partition ends with its sample digests; one whose rows are all there is not read again.

    Raises
    ------
    InputError
        If an image cannot be decoded or gives features that are not finite.
    """
    missing = {p.name: [b for b in backbones if not staging.has(b.card.hash, p)] for p in of}
    work = [
        (p, sorted({b.card.preprocessing for b in missing[p.name]}, key=repr))
        for p in of
        if missing[p.name] or not staging.has("digests", p)
    ]
    total = sum(len(p.samples) for p in of)
    resumed = total - sum(len(p.samples) for p, _ in work)
    began, read = time.perf_counter(), 0
    progress(Progress("features", resumed, total, "images"))
    rows: dict[str, list[npt.NDArray[np.float32]]] = {}
    digests: list[npt.NDArray[np.uint8]] = []
    for position, batch in decoded(source, work):
        partition, _ = work[position]
        for backbone in missing[partition.name]:
            found = features_of(backbone, batch)
            require_finite(found, batch, partition.split, source, backbone)
            rows.setdefault(backbone.card.hash, []).append(found)
        digests.append(batch.digests)
        read += len(batch.samples)
        if sum(map(len, digests)) == len(partition.samples):
            for key, parts in rows.items():
                staging.put(key, partition, np.concatenate(parts))
            staging.put("digests", partition, np.concatenate(digests))
            rows, digests = {}, []
        rate = read / (time.perf_counter() - began)
        progress(Progress("features", resumed + read, total, "images", {"images/s": rate}))
    return Pass(read, resumed, time.perf_counter() - began)
