import pytest

from sfm.distill.captions import short_captions


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (
            ["001.Black_footed_Albatross", "002.Laysan_Albatross"],
            ["Black_footed_Albatross", "Laysan_Albatross"],
        ),
        (["bird/owl", "bird/crow"], ["owl", "crow"]),
        (["class_1", "class_10", "class_2"], ["1", "10", "2"]),
        (["Sandal", "Shirt", "Sneaker"], ["Sandal", "Shirt", "Sneaker"]),
        (["red apple", "red"], ["red apple", "red"]),
        (["1. a", "2. a"], ["1. a", "2. a"]),
        (["bird_owl"], ["bird_owl"]),
        (["a crane", "a crane", "a bird"], ["crane", "crane", "bird"]),
        ([], []),
    ],
)
def test_captions_leave_out_what_all_names_begin_with(names: list[str], shown: list[str]) -> None:
    assert short_captions(names) == shown
