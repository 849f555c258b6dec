"""Names of the files in a directory of images, and how such a directory is told from other images."""

from pathlib import Path

RUN_FILE, FOREIGN_RECORD_FILE, CLASSES_FILE = "run.json", "images.json", "classes.json"

IMAGE_FOLDER = "images"


def is_run_directory(path: Path) -> bool:
    """Return whether a path is a directory that this program wrote, finished or not."""
    if any((path / name).exists() for name in (RUN_FILE, FOREIGN_RECORD_FILE, "checkpoint")):
        return True
    return (path / CLASSES_FILE).exists() and (path / IMAGE_FOLDER).is_dir()


def make_foreign_result_folder(images_path: Path) -> Path:
    """Return the folder beside images of another program that their evaluation is written to."""
    return images_path.with_name(f"{images_path.name}-evaluation")
