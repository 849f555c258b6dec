"""The command that adds what a store lacks runs as it is printed."""

from pathlib import Path

import pytest

from sfm.errors import InputError
from sfm.pipeline.entry_rows import make_entry_options
from sfm.pipeline.extract_config import ExtractConfig
from sfm.stats_store.entry_selection import NotExtractedError, select_model_summaries_of_one_size
from sfm.stats_store.extract_command import DEFAULT_OPTIONS, format_extract_command, format_nondefault_options
from sfm.stats_store.store import open_store


def test_suggested_extract_command_repeats_the_options_of_the_entry(fashion_store: str) -> None:
    store = open_store(fashion_store)
    with pytest.raises(NotExtractedError) as missing:
        select_model_summaries_of_one_size(
            store.list_summaries(), dataset="fashion-mnist-6k@tuning", model="tf_efficientnet_lite2"
        )
    assert format_extract_command(store, missing.value.stored_entries_of_dataset[0], "lite2", None) == (
        f"sfm extract builtin:fashion-mnist-6k --store {fashion_store} --backbone lite2 --image-size 32 "
        "--sub-classes 2,3 --exemplars 6 --limit-per-class 40 --tune-fraction 0.25"
    )


def test_omitted_options_equal_the_extract_defaults() -> None:
    config = ExtractConfig(source="builtin:fashion-mnist-6k", store="s", backbone=["lite0"])
    assert format_nondefault_options(make_entry_options(config, "full", {})) == []
    for name, default in DEFAULT_OPTIONS.items():
        if name != "views":
            own = getattr(config, name)
            assert (list(own) if isinstance(own, tuple) else own) == default


def test_distill_with_a_missing_entry_suggests_the_extract_command(
    fashion_store: str, tmp_path: Path
) -> None:
    from sfm.distill.config import DistillConfig
    from sfm.distill.run import distill

    asked = {"store": fashion_store, "dataset": "fashion-mnist-6k", "out": tmp_path / "run"}
    with pytest.raises(
        InputError, match=r"to add it: sfm extract builtin:fashion-mnist-6k .*--backbone lite2"
    ):
        distill(DistillConfig.model_validate(asked | {"backbone": "lite2"}))
    with pytest.raises(InputError, match=r"to add it: sfm extract .*--backbone lite0 --image-size 64"):
        distill(DistillConfig.model_validate(asked | {"backbone": "lite0", "image_size": 64}))
