"""From a folder of images to accuracies, with the folder deleted on the way."""

import json
import shutil

import pytest

from sfm.api import DistillConfig, EvaluateConfig, ExtractConfig, distill, evaluate, extract, open_store


@pytest.mark.slow
def test_after_extraction_the_raw_images_are_not_needed(image_folder, tmp_path):
    store, run = str(tmp_path / "store"), tmp_path / "run"
    extract(
        ExtractConfig(
            source=f"folder:{image_folder}",
            store=store,
            backbone=["lite0", "lite1"],
            image_size=64,
            sub_classes=(2,),
            exemplars=4,
        )
    )
    shutil.rmtree(image_folder)
    distill(
        DistillConfig(
            store=store, backbone="lite0", dataset="garments", out=run, steps=150, learning_rate=0.05
        )
    )
    evaluate(
        EvaluateConfig(run=run, store=store, backbone=["lite0", "lite1"], epochs=1000, views=20, seeds=2)
    )
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    reached = {(r["images"], r["backbone"], r["mode"]): r["top1_mean"] for r in rows}
    assert {("distilled", b, m) for b in ("lite0", "lite1") for m in ("linear", "inherit")} <= set(reached)
    assert {("random", "lite0", "linear"), ("nearest", "lite1", "linear")} <= set(reached)
    # Three classes: chance is a third. A bag, a boot and trousers are easy to tell apart.
    assert reached["distilled", "lite0", "linear"] > 0.6
    assert [p.name for p in sorted((run / "images").iterdir())] == ["0_bag", "1_boot", "2_trouser"]
    assert len(open_store(store).list_summaries()) == 2
