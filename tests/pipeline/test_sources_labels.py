"""Labels that are text: an id is an id, digits or not, and no two ways of writing become one class."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sfm.errors import InputError
from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.sources import open_source
from sfm.pipeline.sources.class_labels import class_id_from_label
from sfm.stats_store.class_lists import ParsedClassList

# In ImageFolder's order, which is not that of the numbers.
TWELVE_CLASSES = ParsedClassList("a list", sorted(map(str, range(12))), {})


@pytest.mark.parametrize("text", ["2", " 10\n", "11"])
def test_text_equal_to_a_listed_id_is_that_class(text):
    assert class_id_from_label(text, TWELVE_CLASSES, "somewhere") == text.strip()


def test_an_integer_label_is_a_position():
    assert class_id_from_label(2, TWELVE_CLASSES, "somewhere") == "10"


def test_digits_that_are_not_a_listed_id_are_a_position():
    assert class_id_from_label("1", ParsedClassList("a list", ["bag", "boot"], {}), "somewhere") == "boot"
    assert class_id_from_label("001", ParsedClassList("a list", ["001", "002"], {}), "somewhere") == "001"


def test_a_listed_id_matches_in_the_other_unicode_normal_form():
    assert class_id_from_label("e\u0301", ParsedClassList("a list", ["\xe9"], {}), "somewhere") == "\xe9"


def make_grey_png(level: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), level, np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_shards(root: Path, labels: dict[str, list[object]], ending: str = "txt") -> Path:
    """One shard per split; the image of label number i of a split is grey level 20 i."""
    root.mkdir()
    for split, own in labels.items():
        with tarfile.open(root / f"{split}-0.tar", "w") as archive:
            for number, label in enumerate(own):
                text = json.dumps({"label": label}) if ending == "json" else str(label)
                for name, data in (("png", make_grey_png(20 * number % 256)), (ending, text.encode())):
                    member = tarfile.TarInfo(f"{number:03d}.{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return root


def write_tables(root: Path, labels: dict[str, list[object]]) -> Path:
    root.mkdir()
    for split, own in labels.items():
        images = [{"bytes": make_grey_png(20 * n % 256), "path": None} for n in range(len(own))]
        pq.write_table(pa.table({"image": images, "label": own}), root / f"{split}-0.parquet")
    return root


def read_class_ids(spec: str) -> list[str]:
    return [sample.class_id for shard in open_source(spec).train.shards for sample in shard.read(None)]


@pytest.mark.parametrize("ending", ["txt", "cls", "json"])
def test_text_labels_of_shards_are_independent_of_the_class_list_order(tmp_path, ending):
    texts = [str(c) for c in range(12)]
    (tmp_path / "names.txt").write_text("\n".join(TWELVE_CLASSES.class_ids))
    root = write_shards(tmp_path / "ds", {"train": texts, "val": texts}, ending)
    assert read_class_ids(f"wds:{root}?names={tmp_path}/names.txt") == texts


def test_integer_labels_in_json_are_positions(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(TWELVE_CLASSES.class_ids))
    root = write_shards(tmp_path / "ds", {"train": list(range(12)), "val": list(range(12))}, "json")
    assert read_class_ids(f"wds:{root}?names={tmp_path}/names.txt") == TWELVE_CLASSES.class_ids


def test_a_text_column_holds_ids_and_an_integer_column_holds_numbers(tmp_path):
    texts = write_tables(tmp_path / "texts", {"train": ["1", "01", "2"], "test": ["1", "01", "2"]})
    assert open_source(f"parquet:{texts}").class_ids == ["01", "1", "2"]
    assert read_class_ids(f"parquet:{texts}") == ["1", "01", "2"]
    numbers = write_tables(tmp_path / "numbers", {"train": [1, 2], "test": [1, 2]})
    assert open_source(f"parquet:{numbers}").class_ids == ["00001", "00002"]


def test_a_text_column_with_a_class_list_keeps_its_classes(tmp_path):
    texts = [str(c) for c in range(12)]
    (tmp_path / "names.txt").write_text("\n".join(TWELVE_CLASSES.class_ids))
    root = write_tables(tmp_path / "ds", {"train": texts, "test": texts})
    assert read_class_ids(f"parquet:{root}?names={tmp_path}/names.txt") == texts


def test_labels_that_mix_positions_and_ids_of_one_class_are_refused(tmp_path):
    (tmp_path / "names.txt").write_text("1\n2\n5\n10\n")
    root = write_tables(tmp_path / "ds", {"train": ["0", "1", "2", "3"], "test": ["0", "1", "2", "3"]})
    with pytest.raises(InputError, match=r"writes labels of class 1 as '[01]' and as '[01]'"):
        open_source(f"parquet:{root}?names={tmp_path}/names.txt")


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_with_two_spellings_of_one_number_are_refused(tmp_path, split):
    labels = {"train": ["1", "2", "1", "2"], "val": ["1", "2", "1", "2"]}
    labels[split] = ["01", "2", "1" if split == "train" else "01", "2"]
    root = write_shards(tmp_path / "ds", labels)
    config = ExtractConfig(
        source=f"wds:{root}", store=str(tmp_path / "st"), backbone=["lite0"], image_size=32, sub_classes=(2,)
    )
    with pytest.raises(InputError, match=r"writes labels of class 00001 as '0?1' and as '0?1'"):
        extract(config)
    assert not list((tmp_path / "st" / "index").glob("**/*.json"))
