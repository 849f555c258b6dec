"""Every test and every page that the documentation names is there: a promise without a test is none."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECURITY = ROOT / "docs" / "security.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "SECURITY.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_tests_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tests = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"`(test_\w+\.py)`", text)) <= tests
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


def test_every_untrusted_input_in_the_security_page_names_a_test() -> None:
    table = SECURITY.read_text(encoding="utf-8").split("## Not trusted")[1].split("\n\n")[2]
    rows = table.splitlines()[2:]
    assert len(rows) >= 9
    assert all(re.search(r"`test_\w+\.py`", row) for row in rows)
