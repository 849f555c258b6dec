import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from sfm.errors import InputError
from sfm.eval.distilled_run import read_distilled_run

NewRun = Callable[..., Path]


def test_distilled_images_are_read_in_the_order_of_torchvision(new_run: NewRun) -> None:
    run = new_run(ipc=2)
    read = read_distilled_run(run)
    folder = ImageFolder(str(run / "images"))
    assert len(folder) == 20
    for (image, label), pixels, own in zip(folder, read.pixels, read.labels, strict=True):
        assert np.array_equal(np.asarray(image), pixels)
        assert label == own


def test_an_edited_image_is_read_as_it_is(new_run: NewRun) -> None:
    run = new_run()
    path = run / "images" / "3_class" / "0.png"
    with Image.open(path) as image:
        image.convert("RGBA").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
        expected = np.asarray(image)[:, ::-1]
    assert np.array_equal(read_distilled_run(run).pixels[3], expected)


def test_hidden_files_among_the_images_are_ignored(new_run: NewRun) -> None:
    run = new_run()
    (run / "images" / ".DS_Store").touch()
    assert len(read_distilled_run(run).pixels) == 10


def drop_image(run: Path) -> None:
    (run / "images" / "4_class" / "0.png").unlink()


def drop_class(run: Path) -> None:
    shutil.rmtree(run / "images" / "7_class")


def drop_all(run: Path) -> None:
    shutil.rmtree(run / "images")


def add_image(run: Path) -> None:
    shutil.copy(run / "images" / "4_class" / "0.png", run / "images" / "4_class" / "1.png")


def add_class(run: Path) -> None:
    shutil.copytree(run / "images" / "4_class", run / "images" / "10_class")


def add_notes(run: Path) -> None:
    (run / "images" / "4_class" / "notes.txt").touch()


def shrink_image(run: Path) -> None:
    Image.new("RGB", (36, 37)).save(run / "images" / "4_class" / "0.png")


def spoil_image(run: Path) -> None:
    path = run / "images" / "4_class" / "0.png"
    path.write_bytes(path.read_bytes()[:200])


def write_nonsense(run: Path) -> None:
    (run / "images" / "4_class" / "0.png").write_text("not a picture")


def drop_record(run: Path) -> None:
    (run / "run.json").unlink()


def make_unfinished(run: Path) -> None:
    (run / "run.json").unlink()
    (run / "checkpoint").mkdir()


def drop_classes(run: Path) -> None:
    (run / "classes.json").unlink()


def spoil_record(run: Path) -> None:
    (run / "run.json").write_text("{")


def set_another_command(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"command": "extract"}))


def renumber_classes(run: Path) -> None:
    classes = json.loads((run / "classes.json").read_text())
    (run / "classes.json").write_text(json.dumps(classes[1:]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_image, r"4_class should hold 1 image, but number 0 is missing"),
        (drop_class, r"images should hold 10 class folders, but number 7 is missing"),
        (drop_all, r"images is missing"),
        (add_image, r"unexpected .*4_class/1\.png: .* should hold 1 image and no more"),
        (add_class, r"unexpected .*10_class: .* should hold 10 class folders and no more"),
        (add_notes, r"unexpected .*notes\.txt"),
        (shrink_image, r"4_class/0\.png: it has 36 x 37 pixels, 37 x 37 are expected"),
        (spoil_image, r"cannot read the image .*4_class/0\.png"),
        (write_nonsense, r"cannot read the image .*4_class/0\.png"),
        (drop_record, r"not a finished run of `sfm distill`: cannot read run\.json"),
        (make_unfinished, r"not a finished run of `sfm distill`, but holds a checkpoint: .* with --resume"),
        (drop_classes, r"not a finished run of `sfm distill`: cannot read classes\.json"),
        (spoil_record, r"run\.json is not what `sfm distill` writes"),
        (set_another_command, r"run\.json is not what `sfm distill` writes: command"),
        (renumber_classes, r"does not number its classes"),
    ],
)
def test_an_incomplete_run_directory_raises_a_one_line_error(
    new_run: NewRun, damage: Callable[[Path], None], message: str
) -> None:
    run = new_run()
    damage(run)
    with pytest.raises(InputError, match=message) as caught:
        read_distilled_run(run)
    assert "\n" not in str(caught.value)


def test_a_missing_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run directory at"):
        read_distilled_run(tmp_path / "nowhere")
