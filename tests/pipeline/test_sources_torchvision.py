"""Datasets as torchvision keeps them: arrays become portable pixmaps, files are taken as they are."""

import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from source_samples import group_samples_by_split

from sfm.errors import InputError
from sfm.pipeline.sources import Sample, Split, open_source
from sfm.pipeline.sources.torchvision_datasets import SPLIT_ARGUMENTS, encode_as_portable_pixmap
from sfm.testing import SourceTests


def read_samples(split: Split) -> list[Sample]:
    return [sample.read() for shard in split.shards for sample in shard.read(None)]


def test_every_supported_dataset_exists_in_torchvision():
    assert all(hasattr(torchvision.datasets, name) for name in SPLIT_ARGUMENTS)


@pytest.fixture
def fashion_mnist_root(tmp_path: Path) -> Path:
    """Some images of Fashion-MNIST, as torchvision keeps them: unpacked idx files."""
    source = open_source("builtin:fashion-mnist-6k")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, split in (("train", source.train), ("t10k", source.test)):
        samples = list(split.read(np.arange(100)))
        images, labels = b"".join(s.data for s in samples), bytes(int(s.class_id) for s in samples)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 100, 28, 28) + images)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 100) + labels)
    return tmp_path


class TestTorchvisionArrays(SourceTests):
    @pytest.fixture
    def spec(self, fashion_mnist_root):
        return f"torchvision:FashionMNIST?root={fashion_mnist_root}"


class TestTorchvisionFiles(SourceTests):
    @pytest.fixture
    def spec(self, tmp_path, pictures):
        write_imagenette(tmp_path, pictures)
        return f"torchvision:Imagenette?root={tmp_path}"

    @pytest.fixture
    def expected_samples(self, pictures):
        samples = group_samples_by_split(pictures)
        return {split: [(WORDNET_IDS[label], data) for label, data in own] for split, own in samples.items()}


def test_arrays_are_encoded_losslessly_and_labelled_by_name(fashion_mnist_root):
    source = open_source(f"torchvision:FashionMNIST?root={fashion_mnist_root}")
    other = open_source("builtin:fashion-mnist-6k")
    assert source.name == "fashionmnist"
    assert source.class_ids == sorted(other.class_names)
    for mine, theirs in zip(read_samples(source.train), other.train.read(np.arange(100)), strict=True):
        np.testing.assert_array_equal(source.decode(mine.data), other.decode(theirs.data))
        assert mine.class_id == other.class_names[int(theirs.class_id)]


def test_arrays_are_encoded_to_the_same_bytes_on_every_machine():
    digest = hashlib.sha256(
        encode_as_portable_pixmap(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    ).hexdigest()
    assert digest == hashlib.sha256(b"P6\n4 2\n255\n" + bytes(range(24))).hexdigest()
    channels_first = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    assert encode_as_portable_pixmap(channels_first) == encode_as_portable_pixmap(
        channels_first.transpose(1, 2, 0)
    )


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 of twenty images per file, in the published layout, with checksums to match."""
    root, rng, sums = tmp_path / "cifar-10-batches-py", np.random.default_rng(0), {}
    root.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [*range(10)] * 2}
        (root / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in root.iterdir()}
    kind = torchvision.datasets.CIFAR10
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(kind, attribute, [[name, sums[name]] for name, _ in getattr(kind, attribute)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    return tmp_path


def test_cifar_images_and_labels_match_torchvision(cifar_root):
    source = open_source(f"torchvision:CIFAR10?root={cifar_root}")
    assert source.class_ids[:3] == ["airplane", "automobile", "bird"]
    for train, split in ((True, source.train), (False, source.test)):
        theirs = torchvision.datasets.CIFAR10(cifar_root, train=train)
        for (picture, label), sample in zip(theirs, read_samples(split), strict=True):
            np.testing.assert_array_equal(source.decode(sample.data), picture)
            assert sample.class_id == theirs.classes[label]


def test_an_incomplete_cifar_is_refused(cifar_root):
    (cifar_root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"cannot open torchvision:CIFAR10.*not found or corrupted.*download=yes"
    ):
        open_source(f"torchvision:CIFAR10?root={cifar_root}")


WORDNET_IDS = {"bag": "n01440764", "boot": "n02102040", "trouser": "n02979186"}


def write_imagenette(root, pictures):
    for picture in pictures:
        split = "train" if picture.split == "train" else "val"
        folder = root / "imagenette2" / split / WORDNET_IDS[picture.class_id]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{picture.number}.jpeg").write_bytes(picture.data)


def test_imagenette_files_have_wordnet_ids_and_missing_files_are_named_in_the_error(tmp_path, pictures):
    write_imagenette(tmp_path, pictures)
    source = open_source(f"torchvision:Imagenette?root={tmp_path}")
    assert source.class_ids == ["n01440764", "n02102040", "n02979186"]
    assert source.class_names[0] == "tench"
    (tmp_path / "imagenette2" / "train" / "n01440764" / "0.jpeg").unlink()
    with pytest.raises(InputError, match=r"0.jpeg vanished while the dataset was read"):
        read_samples(source.train)
    (tmp_path / "imagenette2" / "train" / "n01440764" / "0.jpeg").symlink_to("gone.jpeg")
    with pytest.raises(InputError, match=r"0.jpeg is a link to gone.jpeg, which is not there"):
        open_source(f"torchvision:Imagenette?root={tmp_path}")


def test_pet_class_ids_are_independent_of_their_numbering(tmp_path, pictures):
    root = tmp_path / "oxford-iiit-pet"
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    number = {"trouser": 1, "bag": 2, "boot": 3}
    for split, name in (("train", "trainval"), ("test", "test")):
        lines = []
        for p in pictures:
            if p.split == split:
                stem = f"{p.class_id}_{split}{p.number}"
                (root / "images" / f"{stem}.jpg").write_bytes(p.data)
                lines.append(f"{stem} {number[p.class_id]} 1 1")
        (root / "annotations" / f"{name}.txt").write_text("\n".join(lines))
    source = open_source(f"torchvision:OxfordIIITPet?root={tmp_path}")
    assert source.class_ids == ["Bag", "Boot", "Trouser"]
    expected = [(p.class_id.title(), p.data) for p in pictures if p.split == "test"]
    assert [(s.class_id, s.data) for s in read_samples(source.test)] == expected


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("cifar10?root=x", "did you mean CIFAR10"),
        ("Flower102?root=x", "did you mean Flowers102"),
        ("COCO?root=x", "there are CIFAR10, CIFAR100"),
        ("CIFAR10", r"write torchvision:CIFAR10\?root=PATH"),
        ("CIFAR10?root=/no/such/place", "put the dataset under /no/such/place"),
        ("ImageNet?root=/no/such/place", "cannot open torchvision:ImageNet"),
        ("CIFAR10?root=x&download=maybe", "write download=yes or download=no"),
    ],
)
def test_an_unknown_torchvision_dataset_error_gives_a_hint(spec, complaint):
    with pytest.raises(InputError, match=complaint):
        open_source(f"torchvision:{spec}")


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_pickles_without_the_published_checksum_are_not_unpickled(tmp_path, name):
    opened = getattr(torchvision.datasets, name)
    folder = tmp_path / opened.base_folder
    folder.mkdir()
    for file in [*(file for file, _ in (*opened.train_list, *opened.test_list)), opened.meta["filename"]]:
        (folder / file).write_bytes(pickle.dumps(Command(f"touch {tmp_path / 'pwned'}")))
    with pytest.raises(InputError, match="not found or corrupted"):
        open_source(f"torchvision:{name}?root={tmp_path}")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"\0\0\x0a\x03" + b"\xff" * 8, b"\xff" * 40])
def test_files_that_torchvision_cannot_open_raise_an_input_error(tmp_path, content):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (folder / f"{split}-{kind}-ubyte").write_bytes(content)
    with pytest.raises(InputError, match="cannot open torchvision:MNIST"):
        open_source(f"torchvision:MNIST?root={tmp_path}")
