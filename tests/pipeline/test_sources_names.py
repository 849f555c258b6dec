"""Names of files, folders and datasets as real disks have them: not UTF-8, in two normal forms, linked."""

import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from sfm.errors import InputError
from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.sources import Shard, Source, Split, open_source
from sfm.pipeline.sources.decode import decode_image
from sfm.pipeline.sources.unicode_class_ids import normalize_source_class_ids
from sfm.stats_store.store import open_store

NFC, NFD = unicodedata.normalize("NFC", "été"), unicodedata.normalize("NFD", "été")


def rename_class(root: Path, old: str, train: str | bytes, test: str | bytes) -> None:
    for split, new in (("train", train), ("test", test)):
        target = os.path.join(os.fsencode(root / split), os.fsencode(new))  # noqa: PTH118
        (root / split / old).rename(os.fsdecode(target))


def read_labelled_images(split: Split) -> list[tuple[str, bytes]]:
    found = (sample.read() for shard in split.shards for sample in shard.read(None))
    return sorted((sample.class_id, sample.data) for sample in found)


def make_config(source: Path | str, store: Path, **words: object) -> ExtractConfig:
    known = {"backbone": ["lite0"], "image_size": 32, "sub_classes": (2,), "store": str(store)}
    return ExtractConfig(source=f"folder:{source}", **(known | words))


def test_a_class_folder_in_two_unicode_normal_forms_is_one_class(image_folder, tmp_path):
    composed = shutil.copytree(image_folder, tmp_path / "linux")
    rename_class(composed, "bag", NFC, NFC)
    rename_class(image_folder, "bag", NFD, NFC)
    source, other = open_source(f"folder:{image_folder}"), open_source(f"folder:{composed}")
    assert source.class_ids == source.class_names == ["boot", "trouser", NFC]
    for name, split in source.splits.items():
        assert sorted(source.labels[name]) == sorted(other.labels[name])
        assert read_labelled_images(split) == read_labelled_images(other.splits[name])


def test_folders_of_one_split_that_differ_only_in_normal_form_are_refused(image_folder):
    rename_class(image_folder, "bag", NFC, NFC)
    rename_class(image_folder, "boot", NFD, NFD)
    with pytest.raises(InputError, match="the same but for how they are written"):
        open_source(f"folder:{image_folder}")


def test_a_class_is_selected_in_either_unicode_normal_form(image_folder, tmp_path):
    rename_class(image_folder, "bag", NFD, NFD)
    listed = tmp_path / "some.txt"
    for form in (NFC, NFD):
        listed.write_text(f"{form}\tSummer\nboot\n", encoding="utf-8")
        source = open_source(f"folder:{image_folder}?classes={listed}")
        assert (source.class_ids, source.class_names) == (["boot", NFC], ["boot", "Summer"])


def test_files_with_non_utf8_names_are_read_and_escaped_in_messages(image_folder, tmp_path):
    folder = os.fsencode(image_folder / "train" / "bag")
    os.rename(folder + b"/000.png", folder + b"/caf\xe9.png")  # noqa: PTH104
    Path(os.fsdecode(folder + b"/\xff.png")).write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot decode") as refused:
        extract(make_config(image_folder, tmp_path / "st"))
    assert "bag" in str(refused.value)
    done = extract(make_config(image_folder, tmp_path / "st", on_error="skip"))
    assert done.published[0].summary.train_samples == 36
    store = open_store(str(tmp_path / "st"))
    (line,) = store.open_entry(store.list_summaries()[0]).extraction.skipped
    assert r"/bag/\xff.png: " in line


def test_a_class_folder_with_a_non_utf8_name_is_refused(image_folder):
    rename_class(image_folder, "bag", b"caf\xe9", b"caf\xe9")
    with pytest.raises(InputError, match=r"not UTF-8: caf\\xe9; rename it"):
        open_source(f"folder:{image_folder}")


def test_a_dataset_is_named_after_its_symlink_without_reserved_characters(image_folder, tmp_path):
    (tmp_path / "birds@2024").symlink_to(image_folder)
    assert open_source(f"folder:{tmp_path}/birds@2024").name == "birds-2024"
    assert open_source(f"folder:{tmp_path}/birds@2024/train/..").name == "birds-2024"


def test_a_name_that_differs_from_the_stored_one_is_refused(image_folder, tmp_path):
    entry = extract(make_config(image_folder, tmp_path / "st", name="theirs")).published[0].summary
    refusal = f"--name mine is not taken: .* as theirs@{entry.entry_digest[:12]} .* --replace"
    with pytest.raises(InputError, match=refusal):
        extract(make_config(image_folder, tmp_path / "st", name="mine"))
    with pytest.raises(InputError, match=refusal):
        extract(make_config(image_folder, tmp_path / "st", name="mine", rehash=True))
    assert extract(make_config(image_folder, tmp_path / "st", name="theirs")).pass_summary.images_read == 0
    replaced = extract(make_config(image_folder, tmp_path / "st", name="mine", replace=True)).published[0]
    assert (replaced.outcome, replaced.summary.dataset) == ("published", "mine")


def test_changed_display_names_are_reported(image_folder, tmp_path):
    listed = tmp_path / "garments.txt"
    spec = f"{image_folder}?classes={listed}"
    listed.write_text("bag\nboot\ntrouser\n")
    assert extract(make_config(spec, tmp_path / "st")).notes == ()
    listed.write_text("bag\tHandbag\nboot\ntrouser\n")
    again = extract(make_config(spec, tmp_path / "st"))
    assert again.pass_summary.images_read == 0
    (note,) = again.notes
    assert "class bag is 'bag' there and 'Handbag' now" in note
    assert "--replace" in note


def test_unused_file_counts_are_kept_when_classes_are_renamed():
    shard = Shard("a shard", None, lambda positions: iter(()))
    source = Source(
        name="d",
        spec="plugin:d",
        class_ids=["boot", NFD],
        class_names=None,
        train=Split((shard,), "listing"),
        test=Split((shard,), "listing"),
        decode=decode_image,
    )
    renamed = normalize_source_class_ids(source)
    shard.unused_by_kind[".txt"] += 2
    assert renamed.class_ids == ["boot", NFC]
    assert renamed.train.shards[0].unused_by_kind == {".txt": 2}
