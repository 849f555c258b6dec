"""A source of one's own: the documentation's example, installed as a package would be."""

import re
import sys
from pathlib import Path

import pytest

from sfm.errors import InputError
from sfm.pipeline.extract import extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.pipeline.sources import SOURCE_KINDS, open_source

DOCS = Path("docs/sources.md")


def test_every_kind_is_documented_with_an_example():
    text = DOCS.read_text(encoding="utf-8")
    assert all(re.search(rf"^\| \[`{kind}`\]\(#.*`'?{kind}:", text, re.MULTILINE) for kind in SOURCE_KINDS)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The documentation's example as a package on the path that declares its entry point."""
    text = DOCS.read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    points = re.search(r'```toml\n\[project.entry-points."(.*?)"\]\n(\w+) = "(\w+):(\w+)"\n```', text)
    assert code is not None
    assert points is not None
    group, kind, module, function = points.groups()
    site = tmp_path / "site"
    (site / f"{module}-1.0.dist-info").mkdir(parents=True)
    (site / f"{module}.py").write_text(code.group(1))
    (site / f"{module}-1.0.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n"
    )
    (site / f"{module}-1.0.dist-info" / "entry_points.txt").write_text(
        f"[{group}]\n{kind} = {module}:{function}\n"
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, module, raising=False)
    return kind


def test_the_example_is_thirty_lines_at_most():
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    lines = [line for line in code.group(1).splitlines() if line.strip()]
    assert len(lines) <= 30


def test_an_installed_source_is_extracted_like_any_other(plugin, image_folder, tmp_path):
    for split in ("train", "test"):
        files = sorted((image_folder / split).rglob("*.png"))
        rows = (f"{file.relative_to(image_folder)}\t{file.parent.name}" for file in files)
        (image_folder / f"{split}.tsv").write_text("\n".join(rows))
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
