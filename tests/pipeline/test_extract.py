"""Extraction: what is published, what is read, and what survives a kill."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfm.backbones.build import load_backbone
from sfm.backbones.image_tensors import pixels_to_tensor
from sfm.backbones.preprocessing import resize_and_crop_image
from sfm.errors import InputError
from sfm.pipeline import extract as extraction
from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.sources import SOURCE_KINDS, Source, open_source
from sfm.stats_store.entry_selection import select_only_summary
from sfm.stats_store.store import Entry, open_store

SIZE = 32


def make_config(store: Path | str, **changes: object) -> ExtractConfig:
    values: dict[str, object] = {
        "source": "builtin:fashion-mnist-6k",
        "store": str(store),
        "backbone": ["lite0"],
        "image_size": SIZE,
        "limit_per_class": 8,
        "sub_classes": (2,),
    }
    return ExtractConfig(**(values | changes))


def open_entry(url: str, dataset: str = "fashion-mnist-6k", backbone: str = "lite0") -> Entry:
    store = open_store(url)
    return store.open_entry(
        select_only_summary(store.list_summaries(), dataset=dataset, backbone_spec=backbone)
    )


def test_an_entry_holds_every_array_of_the_schema(fashion_store):
    entry = open_entry(fashion_store)
    assert {
        name: (entry.open_array(name).shape, str(entry.open_array(name).dtype))
        for name in entry.list_array_names()
    } == {
        "train/count": ((10,), "int64"),
        "train/mean": ((10, 1280), "float64"),
        "train/scatter_diagonal": ((10, 1280), "float64"),
        "train/within_scatter": ((1280, 1280), "float64"),
        "train/centre_2": ((10, 2, 1280), "float32"),
        "train/centre_count_2": ((10, 2), "int64"),
        "train/centre_3": ((10, 3, 1280), "float32"),
        "train/centre_count_3": ((10, 3), "int64"),
        "classifier/weight": ((10, 1280), "float32"),
        "classifier/bias": ((10,), "float32"),
        "test/feature": ((400, 1280), "float16"),
        "test/label": ((400,), "int32"),
        "exemplar/image": ((10, 6, SIZE, SIZE, 3), "uint8"),
        "exemplar/role": ((10, 6), "uint8"),
        "exemplar/sample": ((10, 6), "int64"),
    }
    assert entry.dataset.class_names[0] == "T-shirt/top"
    assert entry.classifier.converged
    assert entry.classifier.held_out_top1 > 0.4


def test_statistics_match_a_direct_computation(fashion_store):
    entry, source = open_entry(fashion_store), open_source("builtin:fashion-mnist-6k")
    backbone = load_backbone("lite0", image_size=SIZE)
    for c in (0, 9):
        own = np.flatnonzero(source.train.labels == c)[:40]
        pixels = np.stack(
            [
                resize_and_crop_image(source.decode(s.data), backbone.card.preprocessing)
                for s in source.train.read(own)
            ]
        )
        with torch.inference_mode():
            features = backbone.features(pixels_to_tensor(pixels)).double().numpy()
        np.testing.assert_allclose(
            entry.read_array("train/mean")[c], features.mean(axis=0), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            entry.read_array("train/scatter_diagonal")[c],
            ((features - features.mean(axis=0)) ** 2).sum(axis=0),
            rtol=1e-3,
            atol=1e-4,
        )


def test_exemplars_are_the_nearest_images_followed_by_random_ones(fashion_store):
    entry, source = open_entry(fashion_store), open_source("builtin:fashion-mnist-6k")
    role, sample = entry.read_array("exemplar/role"), entry.read_array("exemplar/sample")
    assert role.tolist() == [[1, 1, 1, 0, 0, 0]] * 10
    for c in range(10):
        assert (source.train.labels[sample[c]] == c).all()
    (again,) = source.train.read(sample[4, 2:3])
    image = resize_and_crop_image(source.decode(again.data), entry.backbone.preprocessing)
    np.testing.assert_array_equal(entry.read_array("exemplar/image")[4, 2], image)
    other = open_entry(fashion_store, backbone="lite1").read_array("exemplar/sample")
    np.testing.assert_array_equal(other[:, 3:], sample[:, 3:])


def test_a_tuning_entry_splits_only_the_training_images(fashion_store):
    full, tuning = open_entry(fashion_store), open_entry(fashion_store, "fashion-mnist-6k@tuning")
    assert tuning.summary.role == "tuning"
    assert tuning.read_array("train/count").tolist() == [30] * 10
    assert np.bincount(tuning.read_array("test/label")).tolist() == [10] * 10
    rows = {row.tobytes() for row in full.read_array("test/feature")}
    assert not any(row.tobytes() in rows for row in tuning.read_array("test/feature"))
    # Training part and held-out part together have the mean of the whole training split.
    labels, features = tuning.read_array("test/label"), tuning.read_array("test/feature").astype(np.float64)
    for c in range(10):
        whole = (30 * tuning.read_array("train/mean")[c] + features[labels == c].sum(axis=0)) / 40
        np.testing.assert_allclose(whole, full.read_array("train/mean")[c], rtol=1e-3, atol=1e-3)


def count_decoding(source: Source, decoded: list[bytes]) -> Source:
    def decode(data: bytes):
        decoded.append(data)
        return source.decode(data)

    return Source(
        source.name, source.spec, source.class_ids, source.class_names, source.train, source.test, decode
    )


def test_each_image_is_decoded_once_for_several_backbones(tmp_path, monkeypatch):
    decoded: list[bytes] = []
    monkeypatch.setitem(
        SOURCE_KINDS, "counted", lambda text: count_decoding(SOURCE_KINDS["builtin"](text), decoded)
    )
    extract(make_config(tmp_path / "s", source="counted:fashion-mnist-6k", backbone=["lite0", "lite1"]))
    assert len(decoded) == len(set(decoded)) == 160


def test_an_eager_extraction_applies_no_optimisation_and_gives_the_same_means(tmp_path, monkeypatch):
    extract(make_config(tmp_path / "auto"))

    def refuse(*_: object) -> None:
        raise AssertionError("an optimisation is applied")

    monkeypatch.setattr("sfm.backbones.build.fold_batch_norms_if_equivalent", refuse)
    monkeypatch.setattr("sfm.backbones.execution.preparation.make_input_grad_model", refuse)
    extract(make_config(tmp_path / "eager", execution="eager"))
    means = [open_entry(str(tmp_path / name)).read_array("train/mean") for name in ("auto", "eager")]
    np.testing.assert_allclose(means[1], means[0], rtol=1e-3, atol=1e-4)


def test_a_repeated_extraction_reads_nothing_and_reports_it(tmp_path, monkeypatch):
    decoded: list[bytes] = []
    monkeypatch.setitem(
        SOURCE_KINDS, "counted", lambda text: count_decoding(SOURCE_KINDS["builtin"](text), decoded)
    )
    first = extract(make_config(tmp_path / "s", source="counted:fashion-mnist-6k"))
    decoded.clear()
    again = extract(make_config(tmp_path / "s", source="counted:fashion-mnist-6k"))
    assert [p.outcome for p in again.published] == ["already there"]
    assert again.published[0].summary == first.published[0].summary
    assert again.pass_summary.images_read == 0
    assert decoded == []


def test_rehash_reads_again_and_finds_the_existing_entry(tmp_path):
    extract(make_config(tmp_path / "s"))
    again = extract(make_config(tmp_path / "s", rehash=True))
    assert again.pass_summary.images_read == 160
    assert [p.outcome for p in again.published] == ["already there"]


def test_adding_a_backbone_does_not_change_the_first_entry(tmp_path):
    first = extract(make_config(tmp_path / "s")).published[0].summary
    both = extract(make_config(tmp_path / "s", backbone=["lite0", "lite1"]))
    assert [p.outcome for p in both.published] == ["already there", "published"]
    assert both.published[0].summary == first


def test_other_options_publish_another_variant_of_the_same_data(tmp_path):
    first = extract(make_config(tmp_path / "s")).published[0].summary
    other = extract(make_config(tmp_path / "s", sub_classes=(3,))).published[0].summary
    assert other.fingerprint == first.fingerprint
    assert other.entry_digest != first.entry_digest
    assert len(open_store(str(tmp_path / "s")).list_summaries()) == 2


def test_the_same_images_in_another_folder_have_the_same_digest(tmp_path, image_folder):
    changes = {"limit_per_class": None, "name": "garments"}
    first = (
        extract(make_config(tmp_path / "a", source=f"folder:{image_folder}", **changes)).published[0].summary
    )
    moved = image_folder.rename(tmp_path / "elsewhere")
    for folder in (moved / "train").iterdir():
        for number, file in enumerate(sorted(folder.iterdir())):
            file.rename(file.with_name(f"renamed-{number:03d}.png"))
    again = extract(make_config(tmp_path / "b", source=f"folder:{moved}", **changes)).published[0].summary
    assert again.entry_digest == first.entry_digest


def test_train_bytes_is_the_total_size_of_the_training_files(tmp_path, image_folder):
    options = {"source": f"folder:{image_folder}", "name": "pictures", "limit_per_class": None}
    extract(make_config(tmp_path / "s", **options))
    files = [path for path in (image_folder / "train").rglob("*") if path.is_file()]
    card = open_entry(str(tmp_path / "s"), "pictures").extraction
    assert card.train_bytes == sum(path.stat().st_size for path in files)


def test_train_bytes_of_a_limited_extraction_counts_only_its_images(fashion_store):
    summaries = [s for s in open_store(fashion_store).list_summaries() if s.backbone == "lite0"]
    assert {s.role for s in summaries} == {"full", "tuning"}
    for summary in summaries:
        card = open_store(fashion_store).open_entry(summary).extraction
        assert card.train_bytes == summary.train_samples * 28 * 28


def test_train_features_are_stored_on_request(tmp_path):
    extract(make_config(tmp_path / "s", keep_train_features=True))
    entry = open_entry(str(tmp_path / "s"))
    features, labels = entry.read_array("train/feature").astype(np.float64), entry.read_array("train/label")
    np.testing.assert_allclose(
        features[labels == 3].mean(axis=0), entry.read_array("train/mean")[3], rtol=1e-3, atol=1e-3
    )


def test_held_out_features_are_left_out_on_request(tmp_path):
    extract(make_config(tmp_path / "s", no_held_out=True))
    entry = open_entry(str(tmp_path / "s"))
    assert not any(name.startswith("test/") for name in entry.list_array_names())
    assert entry.classifier.held_out_top1 is not None


def test_small_classes_are_refused_or_dropped_as_requested(tmp_path, image_folder):
    for file in sorted((image_folder / "train" / "boot").iterdir())[5:]:
        file.unlink()
    changes = {"source": f"folder:{image_folder}", "limit_per_class": None, "min_count": 6}
    with pytest.raises(InputError, match=r"boot \(5\); leave them out with --small-classes drop"):
        extract(make_config(tmp_path / "s", **changes))
    extract(make_config(tmp_path / "s", small_classes="drop", **changes))
    entry = open_entry(str(tmp_path / "s"), image_folder.name)
    assert entry.dataset.class_ids == ["bag", "trouser"]
    assert entry.read_array("train/count").tolist() == [12, 12]
    assert np.bincount(entry.read_array("test/label")).tolist() == [8, 8]
    alone = extract(make_config(tmp_path / "s", small_classes="drop", **changes, rehash=True)).published[0]
    shutil.rmtree(image_folder / "train" / "boot")
    shutil.rmtree(image_folder / "test" / "boot")
    same = extract(make_config(tmp_path / "t", **changes)).published[0]
    assert same.summary.entry_digest == alone.summary.entry_digest


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (
            lambda root: (root / "train/boot/003.png").write_bytes(b"no image"),
            "cannot decode .*train/boot/003.png",
        ),
        (
            lambda root: (root / "test/bag/001.png").write_bytes(
                (root / "test/bag/001.png").read_bytes()[:90]
            ),
            "cannot decode .*test/bag/001.png",
        ),
    ],
)
def test_an_unreadable_image_is_named_in_the_error_and_nothing_is_published(
    tmp_path, image_folder, spoil, complaint
):
    spoil(image_folder)
    with pytest.raises(InputError, match=complaint):
        extract(make_config(tmp_path / "s", source=f"folder:{image_folder}", limit_per_class=None))
    assert open_store(str(tmp_path / "s")).list_summaries() == []
    assert [p.name for p in (tmp_path / "s" / "runs").glob("*") if p.is_dir()] == []


def test_non_finite_features_raise_an_error_that_names_the_image(tmp_path, image_folder, monkeypatch):
    (poisoned,) = open_source(f"folder:{image_folder}").train.read(np.array([17]))
    white = image_folder / "train/boot/005.png"
    assert poisoned.location == str(white)
    Image.new("L", (28, 28), 255).save(white)
    real = extraction.load_backbone

    def poisoning(spec: str, **options: object):
        backbone = real(spec, **options)
        inner = backbone.model

        class Poisoned(torch.nn.Module):
            def forward(self, images):
                rows = inner(images)
                rows[(images > 0.99).all(dim=(1, 2, 3))] = float("nan")
                return rows

        object.__setattr__(backbone, "model", Poisoned())
        return backbone

    monkeypatch.setattr(extraction, "load_backbone", poisoning)
    with pytest.raises(InputError, match=f"not finite for {white}"):
        extract(make_config(tmp_path / "s", source=f"folder:{image_folder}", limit_per_class=None))
    assert open_store(str(tmp_path / "s")).list_summaries() == []


def test_a_folder_that_is_not_a_store_is_left_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not a store"):
        extract(make_config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


EXTRACT_PROGRAM = """
import sys
from sfm.start import collect_garbage_less_often
collect_garbage_less_often()
import sfm.stats_store.digests
sfm.stats_store.digests.BLOCK_ROWS = 40
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.extract import extract
done = extract(ExtractConfig(source="builtin:fashion-mnist-6k", store=sys.argv[1], backbone=["lite0"],
                             image_size=32, limit_per_class=20, sub_classes=(2,)))
print(done.published[0].outcome, done.pass_summary.images_resumed, done.published[0].summary.entry_digest)
"""


@pytest.mark.slow
def test_a_killed_extraction_resumes_and_ends_with_the_same_digest(tmp_path):
    def start_extraction(store: Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", EXTRACT_PROGRAM, str(store)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    undisturbed = start_extraction(tmp_path / "a").communicate(timeout=300)[0].split()
    assert undisturbed[:2] == ["published", "0"]
    process = start_extraction(tmp_path / "b")
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "b").glob("staging/*/found/*.json"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert open_store(str(tmp_path / "b")).list_summaries() == []
    resumed = start_extraction(tmp_path / "b").communicate(timeout=300)[0].split()
    assert resumed[0] == "published"
    assert int(resumed[1]) >= 120
    assert resumed[2] == undisturbed[2]
    assert [p for p in (tmp_path / "b" / "staging").iterdir() if p.is_dir()] == []


def test_a_licence_is_stored_on_the_card_and_changes_no_digest(tmp_path):
    plain = extract(make_config(tmp_path / "a", limit_per_class=3)).published[0].summary
    named = extract(make_config(tmp_path / "b", limit_per_class=3, licence="cc-by-4.0")).published[0].summary
    assert open_entry(str(tmp_path / "a")).dataset.licence == "MIT"
    assert open_entry(str(tmp_path / "b")).dataset.licence == "cc-by-4.0"
    assert (named.key, named.entry_digest) == (plain.key, plain.entry_digest)


@pytest.mark.parametrize("rehash", [False, True])
def test_a_licence_that_differs_from_the_stored_one_is_refused(tmp_path, rehash):
    asked = make_config(tmp_path / "store", limit_per_class=3)
    extract(asked)
    with pytest.raises(InputError, match=r"--licence cc-by-4\.0: .* with licence MIT; --replace"):
        extract(asked.model_copy(update={"licence": "cc-by-4.0", "rehash": rehash}))
    extract(asked.model_copy(update={"licence": "cc-by-4.0", "replace": True}))
    assert open_entry(asked.store).dataset.licence == "cc-by-4.0"
    assert extract(asked.model_copy(update={"licence": "cc-by-4.0"})).published[0].outcome == "already there"
