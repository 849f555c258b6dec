"""The labels of images of other programs are matched to an entry's classes in one way, or listed."""

import pytest

from sfm.errors import InputError
from sfm.eval.foreign_classes import match_class_labels

IDS, NAMES = ["n01", "n02", "n03"], ["Bag", "Boot", "T-shirt/top"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["n03", "n01"], {"n03": 2, "n01": 0}),
        (["Boot", "T-shirt/top"], {"Boot": 1, "T-shirt/top": 2}),
        (["2", "0", "1"], {"2": 2, "0": 0, "1": 1}),
        (["00002", "00000", "00001"], {"00002": 2, "00000": 0, "00001": 1}),
        (["1_boot", "0_bag", "2_t-shirt-top"], {"1_boot": 1, "0_bag": 0, "2_t-shirt-top": 2}),
    ],
    ids=["ids", "names", "numbers", "padded", "folders of sfm"],
)
def test_labels_are_ids_or_names_or_positions(labels: list[str], expected: dict[str, int]) -> None:
    matched = match_class_labels(labels, IDS, NAMES, "set.pt", "garments")
    assert matched.index_by_label == expected
    assert bool(matched.note) == (not labels[0].startswith("n0"))


def test_numbers_are_ids_where_the_classes_have_numbers() -> None:
    matched = match_class_labels(["7", "3"], ["00003", "00007"], ["a", "b"], "set.pt", "digits")
    assert matched.index_by_label == {"7": 1, "3": 0}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["n01", "n02", "hat", "cap"], ["2 are no classes there: hat, cap", "1 class has no image: n03"]),
        (["0", "1"], ["2 are no classes there: 0, 1", "3 classes have no image"]),
        (["0", "1", "3"], ["3 are no classes"]),
        (["n01", "Boot"], ["1 is no class there: Boot"]),
    ],
    ids=["unknown", "positions of some", "position beyond", "mixed"],
)
def test_mismatches_are_listed(labels: list[str], words: list[str]) -> None:
    with pytest.raises(InputError, match=r"set\.pt are not the classes of garments") as refusal:
        match_class_labels(labels, IDS, NAMES, "set.pt", "garments")
    assert all(word in str(refusal.value) for word in words)
