"""Every pass counts the used and unused files of a dataset."""

import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from sfm.events import Progress
from sfm.pipeline import feature_pass
from sfm.pipeline.dry_run import estimate_extraction
from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.file_counts import describe_file_counts, make_bounded_file_counts
from sfm.stats_store.cards import ExtractionCard, FileCounts
from sfm.stats_store.store import open_store


def make_config(store: Path, source: str, **changes: object) -> ExtractConfig:
    values: dict[str, object] = {
        "source": source,
        "store": str(store),
        "backbone": ["lite0"],
        "image_size": 32,
        "sub_classes": (2,),
    }
    return ExtractConfig(**(values | changes))


@pytest.fixture
def dataset_specs(tmp_path: Path, image_folder: Path) -> dict[str, str]:
    """A folder and shards of 36 + 24 images, one of them broken, and as many other files: 3 .txt, 1 .npy."""
    broken = image_folder / "train" / "boot" / "000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    root = tmp_path / "shards"
    root.mkdir()
    for split in ("train", "test"):
        for part in range(2):
            with tarfile.open(root / f"{split}-{part}.tar", "w") as archive:
                for number, file in enumerate(sorted((image_folder / split).glob("*/*.png"))[part::2]):
                    add_member(archive, f"{number}.png", file.read_bytes())
                    add_member(archive, f"{number}.cls", file.parent.name.encode())
                if split == "train":
                    add_member(archive, f"{number}.txt", b"a caption")
    with tarfile.open(root / "train-2.tar", "w") as archive:
        add_member(archive, "notes.npy", b"x")
        add_member(archive, "000.png", (image_folder / "train" / "bag" / "000.png").read_bytes())
        add_member(archive, "000.cls", b"bag")
        add_member(archive, "000.txt", b"a caption")
    shutil.copy(image_folder / "train" / "bag" / "000.png", image_folder / "train" / "bag" / "again.png")
    for number, class_id in enumerate(("bag", "bag", "boot")):
        (image_folder / "train" / class_id / f"{number}.txt").write_text("a caption")
    (image_folder / "train" / "bag" / "x.npy").write_bytes(b"x")
    (tmp_path / "two.txt").write_text("bag\nboot\n")
    return {"folder": f"folder:{image_folder}", "wds": f"wds:{root}"}


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, BytesIO(data))


TOTAL_FILES = 65
"""37 + 24 images, 3 captions, 1 array."""


@pytest.mark.parametrize("kind", ["folder", "wds"])
@pytest.mark.parametrize(
    ("changes", "query", "unused"),
    [
        (
            {"limit_per_class": 5},
            "?classes={root}/two.txt",
            {"images of other classes": 20, "images beyond --limit-per-class": 8 + 7 + 3 + 3},
        ),
        ({"min_count": 12, "small_classes": "drop"}, "", {"images of classes below --min-count": 19}),
    ],
    ids=["some classes, limited", "small classes dropped"],
)
def test_every_file_is_used_or_counted_by_kind(tmp_path, dataset_specs, kind, changes, query, unused):
    source = dataset_specs[kind] + query.format(root=tmp_path)
    done = extract(make_config(tmp_path / "s", source, on_error="skip", **changes))
    expected = {".txt": 3, ".npy": 1, "images that cannot be decoded": 1, **unused}
    assert done.files.unused == expected
    assert done.files.found == TOTAL_FILES
    assert done.files.used == TOTAL_FILES - sum(expected.values())
    summary = done.published[0].summary
    assert done.files.used == summary.train_samples + summary.test_samples
    assert open_store(str(tmp_path / "s")).open_entry(summary).extraction.files == done.files
    again = extract(make_config(tmp_path / "s", source, on_error="skip", **changes))
    assert (again.pass_summary.images_read, again.files) == (0, done.files)


def test_a_resumed_pass_counts_all_files(tmp_path, dataset_specs, monkeypatch):
    settings = make_config(tmp_path / "s", dataset_specs["wds"], on_error="skip")
    monkeypatch.setattr(feature_pass, "MAX_PENDING_BATCHES", 0)

    def stop(event: Progress) -> None:
        if event.stage == "features" and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(settings, stop)
    done = extract(settings)
    assert done.pass_summary.images_resumed > 0
    assert (done.files.found, done.files.used) == (TOTAL_FILES, TOTAL_FILES - 5)


def test_file_counts_are_reported_if_the_entry_already_exists(tmp_path, image_folder):
    extract(make_config(tmp_path / "s", f"folder:{image_folder}", name="garments"))
    other = shutil.copytree(image_folder, tmp_path / "other")
    (other / "notes.txt").write_text("about")
    done = extract(make_config(tmp_path / "s", f"folder:{other}", name="garments"))
    assert done.published[0].outcome == "already there"
    assert (done.pass_summary.images_read, done.files.unused) == (60, {".txt": 1})


def test_a_dry_run_reports_the_known_file_counts(tmp_path, dataset_specs):
    planned = estimate_extraction(make_config(tmp_path / "s", dataset_specs["folder"], limit_per_class=5))
    assert planned.files == {
        "found": TOTAL_FILES,
        "used": 30,
        "unused": {".npy": 1, ".txt": 3, "images beyond --limit-per-class": 31},
    }
    streamed = estimate_extraction(make_config(tmp_path / "s", dataset_specs["wds"])).files
    # Three shards, of which the first has a caption.
    assert streamed["unused"] == {".txt": 3}


def test_the_file_count_line_lists_the_most_frequent_kinds_first():
    counts = FileCounts(found=1240, used=1234, unused={".csv": 1, ".txt": 3, "in val/": 2})
    assert (
        describe_file_counts(counts) == "1,240 files found, 1,234 used, 6 not used: 3 .txt, 2 in val/, 1 .csv"
    )
    assert describe_file_counts(FileCounts(found=2, used=2)) == "2 files found, 2 used"


def test_file_counts_of_arbitrary_names_are_bounded_and_serialisable():
    """Names of files are any bytes, and their ends may be numbers."""
    unused = {".x\udce9\n": 9, "in " + "a" * 200 + "/": 8} | {f".{i:03d}": 1 for i in range(100)}
    counts = make_bounded_file_counts(5, unused)
    assert FileCounts.model_validate_json(counts.model_dump_json()) == counts
    assert counts.found == 5 + 9 + 8 + 100
    assert counts.unused[r".x\xe9\n"] == 9
    assert counts.unused["of other kinds"] == 72
    assert max(map(len, counts.unused)) <= 60


def test_entries_of_older_versions_have_no_file_counts():
    card = ExtractionCard(
        options={}, role="full", versions={}, device="cpu", threads=1, seconds=1.0, images_per_second=1.0
    )
    assert card.files is None
