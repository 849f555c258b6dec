"""Subsets by class list: the papers' of ImageNet, lists of one's own; and classes that cannot be used."""

import re
from pathlib import Path

import pytest
import torchvision.datasets
from timm.data import ImageNetInfo

from sfm.errors import InputError
from sfm.pipeline.sources import open_source
from sfm.pipeline.sources.class_labels import (
    LIST_ALIASES,
    class_id_from_label,
    get_wordnet_names_or_ids,
    list_shipped_class_lists,
    read_class_list,
)

LISTS_OF_TEN = [name for name in list_shipped_class_lists() if name not in ("imagenet-100", "imagenet-1k")]


def test_imagenet_1k_classes_match_timm_in_label_order():
    info = ImageNetInfo("imagenet-1k")
    found = read_class_list("imagenet-1k")
    assert found.class_ids == info.label_names()
    assert found.display_names["n02123045"] == "tabby"


@pytest.mark.parametrize("name", list_shipped_class_lists())
def test_a_shipped_class_list_is_a_sorted_subset_of_imagenet_1k(name):
    found = read_class_list(name)
    assert len(found.class_ids) == {"imagenet-1k": 1000, "imagenet-100": 100}.get(name, 10)
    assert found.class_ids == sorted(found.class_ids)
    assert set(found.class_ids) <= set(read_class_list("imagenet-1k").class_ids)
    assert [found.display_names[class_id] for class_id in found.class_ids] == get_wordnet_names_or_ids(
        found.class_ids
    )


def test_class_lists_of_ten_match_their_papers():
    names = {name: set(read_class_list(name).display_names.values()) for name in LISTS_OF_TEN}
    assert names["imagenet-fruits"] == {
        *("pineapple", "banana", "strawberry", "orange", "lemon", "pomegranate", "fig", "bell pepper"),
        *("cucumber", "Granny Smith"),
    }
    assert names["imagenet-cats"] == {
        *("tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat", "lion", "tiger", "jaguar"),
        *("snow leopard", "lynx"),
    }
    assert names["imagenet-birds"] == {
        *("peacock", "flamingo", "macaw", "pelican", "king penguin", "bald eagle", "toucan", "ostrich"),
        *("black swan", "sulphur-crested cockatoo"),
    }
    assert set(read_class_list("imagenette").class_ids) == set(torchvision.datasets.Imagenette._WNID_TO_CLASS)
    assert set(read_class_list("imagewoof").class_ids) == {
        *("n02086240", "n02087394", "n02088364", "n02089973", "n02093754"),
        *("n02096294", "n02099601", "n02105641", "n02111889", "n02115641"),
    }


def test_class_list_aliases_resolve_to_the_same_classes():
    for alias, name in LIST_ALIASES.items():
        assert read_class_list(alias).class_ids == read_class_list(name).class_ids


def test_a_class_subset_of_a_folder_has_its_own_name_and_display_names(image_folder, tmp_path):
    listed = tmp_path / "some.txt"
    listed.write_text("# two of three\ntrouser\tTrousers\n\nbag\n")
    part = open_source(f"folder:{image_folder}?classes={listed}")
    assert part.name == "garments-some"
    assert part.class_ids == ["bag", "trouser"]
    assert part.class_names == ["bag", "Trousers"]
    assert part.spec == f"folder:{image_folder}?classes={listed}"


def test_wordnet_folders_get_display_names_and_missing_listed_classes_are_refused(image_folder):
    ids = ["n02123045", "n02123159", "n02099601"]
    for split in ("train", "test"):
        for old, new in zip(("bag", "boot", "trouser"), ids, strict=True):
            (image_folder / split / old).rename(image_folder / split / new)
    whole = open_source(f"folder:{image_folder}")
    assert dict(zip(whole.class_ids, whole.class_names, strict=True)) == {
        "n02099601": "golden retriever",
        "n02123045": "tabby",
        "n02123159": "tiger cat",
    }
    with pytest.raises(InputError, match="has no class n02123394, n02123597"):
        open_source(f"folder:{image_folder}?classes=imagemeow")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("bag\nhat\n", "has no class hat"),
        ("bag\nbagg\n", r"has no class bagg: did you mean bag\?"),
        ("bag\nboot\nbag\n", "line 3 of class list .* repeats the class bag"),
        ("# nothing\n", "holds no class"),
        ("bag\n", "fewer than two classes"),
    ],
)
def test_a_class_list_that_does_not_match_the_source_is_refused(image_folder, tmp_path, text, complaint):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InputError, match=complaint):
        open_source(f"folder:{image_folder}?classes={tmp_path / 'list.txt'}")


@pytest.mark.parametrize(
    ("listed", "complaint"),
    [
        ("imagenett", "did you mean imagenette"),
        ("/no/such/list.txt", "neither a file nor a list by that name"),
        ("imagenette&classes=imagewoof", "classes is given twice"),
    ],
)
def test_an_unknown_class_list_error_gives_a_hint(image_folder, listed, complaint):
    with pytest.raises(InputError, match=complaint):
        open_source(f"folder:{image_folder}?classes={listed}")


def test_a_binary_file_is_refused_as_a_class_list(image_folder):
    with pytest.raises(InputError, match="it is not UTF-8 text"):
        open_source(f"folder:{image_folder}?classes={image_folder}/train/bag/000.png")


def test_a_question_mark_in_a_path_is_not_an_option(image_folder):
    moved = image_folder.rename(image_folder.with_name("what?"))
    assert open_source(f"folder:{moved}").name == "what?"


@pytest.mark.parametrize("other", ["Bag", "bag ", "ｂａｇ", "BAG"])
def test_classes_that_differ_only_in_spelling_are_refused_with_both_names(image_folder, other):
    for split in ("train", "test"):
        (image_folder / split / "boot").rename(image_folder / split / other)
    with pytest.raises(InputError, match=f"'{other}' and 'bag'|'bag' and '{other}'"):
        open_source(f"folder:{image_folder}")


def test_wordnet_ids_get_their_first_lemma_and_other_ids_are_kept():
    assert get_wordnet_names_or_ids(["n02123045", "n99999999"]) == ["tabby", "n99999999"]
    assert get_wordnet_names_or_ids(["n02123045", "tabby"]) == ["n02123045", "tabby"]


@pytest.mark.parametrize("label", [True, 1.5, None, b"1", "", [0]])
def test_an_unusable_label_is_refused(label):
    with pytest.raises(InputError, match="somewhere has no usable label"):
        class_id_from_label(label, None, "somewhere")


def test_the_documentation_names_every_class_list():
    text = Path("docs/sources.md").read_text(encoding="utf-8")
    for name in (*list_shipped_class_lists(), *LIST_ALIASES):
        assert re.search(rf"`{name}`", text), name
