import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfm.distill.config import DistillConfig
from sfm.distill.run import distill
from sfm.events import Progress
from sfm.stats_store.digests import compute_array_digest


def sheets(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "growth").iterdir())}


def test_a_sheet_is_kept_of_every_level_when_it_is_done(config: DistillConfig) -> None:
    distill(config)
    assert list(sheets(config.out)) == [f"step_{step:08d}.png" for step in (1, 2, 3, 4, 5, 6, 12)]


def test_the_last_sheet_shows_the_first_image_of_every_class(config: DistillConfig) -> None:
    distill(config.model_copy(update={"ipc": 2}))
    files = sorted((config.out / "images").glob("*/0.png"))
    with Image.open(config.out / "growth" / "step_00000012.png") as sheet:
        shown = np.asarray(sheet)
    assert len(files) == 4
    assert (shown == np.concatenate([np.asarray(Image.open(file)) for file in files], axis=1)).all()


def test_a_run_that_was_resumed_has_the_sheets_of_one_that_was_not(
    config: DistillConfig, tmp_path: Path
) -> None:
    whole = config.model_copy(update={"out": tmp_path / "whole", "checkpoint_every": 3})
    broken = whole.model_copy(update={"out": tmp_path / "broken"})
    distill(whole)

    def pull_the_plug(event: Progress) -> None:
        if event.done == 5:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        distill(broken, pull_the_plug)
    distill(broken.model_copy(update={"resume": True}))
    assert sheets(broken.out) == sheets(whole.out)


def test_the_record_knows_the_pixels_that_were_written(config: DistillConfig) -> None:
    distill(config.model_copy(update={"ipc": 2}))
    files = sorted((config.out / "images").glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    assert json.loads((config.out / "run.json").read_text())["images"] == compute_array_digest(pixels)
