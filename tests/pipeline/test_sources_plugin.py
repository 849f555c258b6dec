"""The documentation's examples of a source and its test, installed as a package would be."""

import re
import sys
from pathlib import Path

import pytest

from sfm.errors import InputError
from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.sources import SOURCE_KINDS, open_source

DOCS = Path("docs/sources.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


def load_documented_tests() -> type:
    """Return the class of tests in the documentation."""
    namespace: dict[str, type] = {"__name__": __name__}
    exec(PYTHON_BLOCKS[1], namespace)
    return namespace["TestTsvSource"]


def test_every_source_kind_has_a_documented_example():
    assert all(re.search(rf"^\| \[`{kind}`\]\(#.*`'?{kind}:", DOCS, re.MULTILINE) for kind in SOURCE_KINDS)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The documentation's example as a package on the path that declares its entry point."""
    points = re.search(r'```toml\n\[project.entry-points."(.*?)"\]\n(\w+) = "(\w+):(\w+)"\n```', DOCS)
    assert points is not None
    group, kind, module, function = points.groups()
    site = tmp_path / "site"
    (site / f"{module}-1.0.dist-info").mkdir(parents=True)
    (site / f"{module}.py").write_text(PYTHON_BLOCKS[0])
    (site / f"{module}-1.0.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n"
    )
    (site / f"{module}-1.0.dist-info" / "entry_points.txt").write_text(
        f"[{group}]\n{kind} = {module}:{function}\n"
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, module, raising=False)
    return kind


@pytest.mark.usefixtures("plugin")
class TestDocumentedSource(load_documented_tests()):
    @pytest.fixture(autouse=True)
    def garments(self, image_folder, monkeypatch):
        """The dataset that the documentation names, below the working folder."""
        write_tsv_files(image_folder)
        (image_folder.parent / "tests").mkdir()
        image_folder.rename(image_folder.parent / "tests" / "garments")
        monkeypatch.chdir(image_folder.parent)


def write_tsv_files(root: Path) -> None:
    for split in ("train", "test"):
        files = sorted((root / split).rglob("*.png"))
        rows = (f"{file.relative_to(root)}\t{file.parent.name}" for file in files)
        (root / f"{split}.tsv").write_text("\n".join(rows))


def test_the_documented_source_examples_are_short():
    lines = [[line for line in block.splitlines() if line.strip()] for block in PYTHON_BLOCKS]
    assert len(lines[0]) <= 30
    assert len([line for line in lines[1] if "import" not in line]) <= 5


def test_an_installed_source_is_extracted_like_any_other(plugin, image_folder, tmp_path):
    write_tsv_files(image_folder)
    done = [
        extract(
            ExtractConfig(source=source, store=str(tmp_path / "store"), backbone=["lite0"], image_size=32)
        )
        for source in (f"folder:{image_folder}", f"{plugin}:{image_folder}")
    ]
    assert [one.published[0].outcome for one in done] == ["published", "already there"]
    (tmp_path / "two.txt").write_text("bag\nboot\n")
    assert open_source(f"{plugin}:{image_folder}?classes={tmp_path / 'two.txt'}").class_ids == ["bag", "boot"]
    with pytest.raises(InputError, match=f"did you mean {plugin}:"):
        open_source(f"{plugin}s:{image_folder}")
