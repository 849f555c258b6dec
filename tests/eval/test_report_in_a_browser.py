"""The report as a real browser shows it. Skipped where there is none."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from sfm.eval.report.config import ReportConfig
from sfm.eval.report.page import report

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine (apt install chromium)")

# Contrast as WCAG 2 defines it, of every element that has text of its own, against what is behind it.
CONTRASTS = """() => {
  const parse = (text) => {
    const c = document.createElement('canvas'); c.width = c.height = 1;
    const x = c.getContext('2d'); x.fillStyle = text; x.fillRect(0, 0, 1, 1);
    return [...x.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce(
      (under, over) => under.map((v, i) => v + (over[i] - v) * over[3] / 255), [255, 255, 255]);
  };
  const found = {};
  for (const element of document.querySelectorAll('body *:not(script):not(dialog):not(dialog *)')) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own) continue;
    const style = getComputedStyle(element);
    const front = parse(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [luminance(front), luminance(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = `${element.tagName}.${element.getAttribute('class') || ''}`;
    found[name] = Math.min(found[name] ?? 99, ratio);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium refuses to put root into its sandbox.
        unboxed = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=BROWSER, args=unboxed)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def reports(finished_run: Path, fashion_store: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A report of one run; and one of two, the other of which was edited, with names that are hard to fit."""
    folder = tmp_path_factory.mktemp("reports")
    other = Path(shutil.copytree(finished_run, folder / ("a-name-that-is-much-too-long-to-fit-" * 4)))
    classes = json.loads((other / "classes.json").read_text())
    for one in classes:
        one["name"] = "Donaudampfschifffahrtsgesellschaftskapitän" * 2
    (other / "classes.json").write_text(json.dumps(classes))
    images = sorted((other / "images").rglob("*.png"))
    shutil.copyfile(images[0], images[1])
    single, several = folder / "one.html", folder / "two.html"
    report(ReportConfig(runs=[finished_run], out=single, store=[fashion_store]))
    report(ReportConfig(runs=[finished_run, other], out=several, store=[fashion_store]))
    return [single, several]


def open_page(browser: Browser, file: Path, width: int = 1280, **options: Any) -> tuple[Page, list[str]]:
    """Open a file; return the page and everything that went wrong or out."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda asked: (
            None if asked.url == file.as_uri() or asked.url.startswith("data:") else wrong.append(asked.url)
        ),
    )
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    return page, wrong


@pytest.mark.parametrize("which", [0, 1])
def test_a_page_makes_no_requests_logs_no_errors_and_loads_every_image(
    browser: Browser, reports: list[Path], which: int
) -> None:
    page, wrong = open_page(browser, reports[which])
    widths = page.evaluate("[...document.querySelectorAll('main img')].map((i) => i.naturalWidth)")
    assert len(widths) > 40
    assert min(widths) >= 32
    assert wrong == []


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("width", [320, 390, 768, 1280, 2560])
def test_a_page_does_not_scroll_horizontally_at_any_width(
    browser: Browser, reports: list[Path], which: int, width: int
) -> None:
    page, _ = open_page(browser, reports[which], width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Only what may scroll by itself is wider than the page.
    beyond = page.evaluate(
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, svg') && "
        f"e.getBoundingClientRect().right > {width} + 1).map((e) => e.tagName)"
    )
    assert beyond == []


def test_chart_text_is_readable_on_a_phone(browser: Browser, reports: list[Path]) -> None:
    page, _ = open_page(browser, reports[0], 390)
    heights = page.evaluate(
        "[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height)"
    )
    assert len(heights) > 20
    assert min(heights) > 7


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_sufficient_contrast(browser: Browser, reports: list[Path], scheme: str) -> None:
    page, _ = open_page(browser, reports[1], color_scheme=scheme)
    contrasts = page.evaluate(CONTRASTS)
    assert {"TD.shaded", "P.warning", "FIGCAPTION.", "text.", "CODE."} <= set(contrasts)
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", dark))) < 60) == (scheme == "dark")


def test_images_are_enlarged_by_mouse_and_keyboard(browser: Browser, reports: list[Path]) -> None:
    page, wrong = open_page(browser, reports[0])
    thumbs = page.locator("button.thumb")
    thumbs.nth(0).click()
    enlarged = page.locator("dialog img")
    assert enlarged.is_visible()
    assert enlarged.bounding_box()["width"] > 3 * thumbs.nth(0).bounding_box()["width"]  # type: ignore[index]
    caption = page.locator("dialog p")
    expect(caption).to_have_text("T-shirt/top: distilled 1")
    page.keyboard.press("ArrowRight")
    expect(caption).to_have_text("T-shirt/top: the real image nearest to distilled 1")
    assert enlarged.get_attribute("src") == thumbs.nth(1).locator("img").get_attribute("src")
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_be_hidden()
    expect(thumbs.nth(1)).to_be_focused()
    thumbs.nth(2).focus()
    page.keyboard.press("Enter")
    expect(caption).to_have_text("T-shirt/top: distilled 2")
    page.get_by_role("button", name="Close").click()
    expect(page.locator("dialog")).to_be_hidden()
    assert wrong == []


def test_a_printed_page_is_white_and_has_no_navigation(browser: Browser, reports: list[Path]) -> None:
    page, _ = open_page(browser, reports[0], color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(0, 0, 0)"
    assert not page.locator("nav").is_visible()
    pages = page.pdf(format="A4").count(b"/Type /Page\n")
    assert 2 <= pages <= 8


def test_bars_differ_without_colour(browser: Browser, reports: list[Path]) -> None:
    page, _ = open_page(browser, reports[0])
    marks = "[...document.querySelectorAll('.mark')]"
    fills = page.evaluate(f"{marks}.map((m) => [m.className, getComputedStyle(m).backgroundImage])")
    patterns = dict(fills)
    assert len(patterns) == 4
    assert len(set(patterns.values())) == 4
