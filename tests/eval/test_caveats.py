"""What figures say against the images stands beside them."""

from sfm.eval.caveats import find_random_baseline, list_above_full_data_notes, list_random_baseline_warnings
from sfm.eval.result import AccuracyRow, EntryRecord, FullDataRow


def make_row(images: str, top1: float, mode: str = "linear", backbone: str = "lite0") -> AccuracyRow:
    return AccuracyRow.model_validate(
        {
            "images": images,
            "backbone": backbone,
            "image_size": 32,
            "mode": mode,
            "top1_mean": top1,
            "top1_std": 0.01,
            "top5_mean": None,
            "top5_std": None,
            "seeds": 2,
            "top1": [top1, top1],
            "top5": None,
        }
    )


def make_full_data_row(classifier: str, top1: float) -> FullDataRow:
    return FullDataRow.model_validate(
        {"backbone": "lite0", "image_size": 32, "classifier": classifier, "top1": top1, "top5": None}
    )


ENTRY = EntryRecord(
    backbone="lite0",
    backbone_hash="ab",
    image_size=32,
    entry_digest="cd",
    held_out_samples=400,
    train_per_class=8.0,
)


def test_random_baseline_warnings_are_given_per_backbone_and_mode() -> None:
    rows = [
        make_row("distilled", 0.4),
        make_row("distilled", 0.6, mode="kd"),
        make_row("random", 0.5),
        make_row("distilled", 0.3, backbone="lite1"),
        make_row("random", 0.3, backbone="lite1"),
        make_row("distilled", 0.1, backbone="lite2"),
    ]
    assert list_random_baseline_warnings(rows) == [
        "The distilled images are no better than as many real ones picked at random: through lite0 at 32 px, "
        "linear, they reach 40.0 ± 1.0 %, random real ones 50.0 ± 1.0 %.",
        "The distilled images are no better than as many real ones picked at random: through lite1 at 32 px, "
        "linear, they reach 30.0 ± 1.0 %, random real ones 30.0 ± 1.0 %.",
    ]


def test_the_random_baseline_has_the_same_protocol_or_else_the_most_thorough() -> None:
    def set_protocol(made: AccuracyRow, epochs: int | None, views: int, seeds: int = 2) -> AccuracyRow:
        return made.model_copy(update={"epochs": epochs, "views": views, "seeds": seeds, "seed": 0})

    short, few, whole = (
        set_protocol(make_row("random", top1), epochs, views)
        for top1, epochs, views in ((0.1, 1, 50), (0.2, 1000, 4), (0.5, 1000, 50))
    )
    rows = [short, few, whole]
    assert find_random_baseline(set_protocol(make_row("distilled", 0.3), 1000, 50), rows) == whole
    assert find_random_baseline(set_protocol(make_row("distilled", 0.3), 1000, 4), rows) == few
    assert find_random_baseline(set_protocol(make_row("distilled", 0.3, "inherit"), 1, 300), rows) == short
    assert (
        find_random_baseline(
            set_protocol(make_row("distilled", 0.3, "inherit-ridge"), None, 9, 1), [short, whole]
        )
        == whole
    )
    assert find_random_baseline(set_protocol(make_row("distilled", 0.3), 1000, 9), rows) is None


def test_accuracy_above_full_data_gives_a_note() -> None:
    data = [
        make_full_data_row("linear", 0.6),
        make_full_data_row("nearest class mean", 0.65),
        make_full_data_row("discriminant", 0.5),
    ]
    (said,) = list_above_full_data_notes([make_row("none", 0.62, "inherit-statistics")], data, [ENTRY])
    assert said.startswith(
        "Above 100 % of full data, through lite0 at 32 px: inherit-statistics 62.0 ± 1.0 %, nearest class "
        "mean 65.0 %; the classifier of all real images has 60.0 %, which learned from 8 images per class."
    )
    assert list_above_full_data_notes([make_row("distilled", 0.5)], data[::2], [ENTRY]) == []
