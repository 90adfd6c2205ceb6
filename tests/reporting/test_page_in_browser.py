"""report.html in a real Chromium: it asks for nothing, has nothing to complain of, and runs only what is its own."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from page_material import HOSTILE, OVERRIDE, STUDY, content

from peft_align.reporting.page import Content, write_page

pytestmark = pytest.mark.slow
PATIENCE = 300_000  # milliseconds; a busy machine is no fault
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        lacking = "needs a browser: there is no chromium on PATH (PEFT_ALIGN_REQUIRE_BROWSER=1 makes this a failure)"
        if os.environ.get("PEFT_ALIGN_REQUIRE_BROWSER") == "1":
            pytest.fail(lacking)
        pytest.skip(lacking)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=PATIENCE)
        yield running
        running.close()


@pytest.fixture(scope="module")
def study() -> Content:
    """The method grid, 164 runs of which a tenth is not done, its scores near the published ones."""
    return content(STUDY, done=0.9)


@pytest.fixture(scope="module")
def report(study: Content, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(study, tmp_path_factory.mktemp("study"))


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Open a file and wait for its charts; afterwards nothing may have been asked for, or told on the console."""
    heard: list[str] = []
    pages = []

    def open_page(path: Path, hash: str = "", size: dict[str, int] = DESKTOP, scheme: str = "light") -> Any:
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.set_default_timeout(PATIENCE)
        pages.append(page)
        address = path.as_uri() + hash
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda asked: heard.append(asked.url) if not _own(asked.url, address) else None)
        page.on("popup", lambda other: heard.append(f"popup: {other.url}"))
        page.goto(address)
        page.locator("html[data-drawn]").wait_for(state="attached")
        return page

    yield open_page
    for page in pages:
        assert page.evaluate("window.ran") is None
        page.close()
    assert heard == []


def _own(asked: str, address: str) -> bool:
    return asked.split("#")[0] == address.split("#")[0] or asked.startswith(("data:", "blob:"))


def until(page: Any, expression: str, wanted: object) -> None:
    """Wait until an expression has a value; the page's policy keeps Playwright's own way from working."""
    found = page.evaluate(expression)
    for _ in range(PATIENCE // 100):
        if found == wanted:
            return
        page.wait_for_timeout(100)
        found = page.evaluate(expression)
    assert found == wanted


def free_point(page: Any) -> tuple[str, float, float]:
    """The run of a point on which no other lies, and where it is."""
    found = page.evaluate(
        """() => {
            document.querySelector('#figure-tradeoff svg').scrollIntoView({block: 'center', behavior: 'instant'});
            for (const mark of document.querySelectorAll('#figure-tradeoff .mark-symbol path')) {
                const box = mark.getBoundingClientRect();
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                const run_id = mark.__data__?.datum?.run_id;  // Vega keeps the datum there
                if (run_id && document.elementFromPoint(x, y) === mark) return [run_id, x, y];
            }
        }"""
    )
    return found[0], found[1], found[2]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_and_the_page_is_no_wider_than_the_window(
    opened: Open, report: Path, study: Content, size: dict[str, int], scheme: str
) -> None:
    page = opened(report, size=size, scheme=scheme)
    assert page.locator(".chart svg.marks").count() == len(study.figures) > 10
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (_lightness(ink) > _lightness(paper)) == (scheme == "dark")
    label = page.locator(".chart svg text").first
    assert page.evaluate("label => getComputedStyle(label).fill", label.element_handle()) == ink


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_text_of_a_chart_is_cut_or_lies_on_another(opened: Open, report: Path, size: dict[str, int]) -> None:
    page = opened(report, size=size)
    found = page.evaluate(
        """() => {
            const told = [];
            const slanted = (each) => /rotate\\((?!-?90)/.test(each.getAttribute('transform'));  // its box is empty
            for (const chart of document.querySelectorAll('.chart svg.marks')) {
                const name = chart.closest('figure').id;
                const frame = chart.getBoundingClientRect();
                const texts = [...chart.querySelectorAll('text')].filter(
                    (each) => each.textContent.trim() && each.checkVisibility({opacityProperty: true}));
                const boxes = texts.map((each) => each.getBoundingClientRect());
                boxes.forEach((box, i) => {
                    const out = [frame.left - box.left, box.right - frame.right, frame.top - box.top,
                                 box.bottom - frame.bottom];
                    if (Math.max(...out) > 1) told.push([name, 'cut', texts[i].textContent]);
                    if (!slanted(texts[i])) boxes.forEach((other, j) => {
                        const across = Math.min(box.right, other.right) - Math.max(box.left, other.left);
                        const down = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
                        if (i !== j && !slanted(texts[j]) && Math.min(across, down) > 1)
                            told.push([name, texts[i].textContent, texts[j].textContent]);
                    });
                });
            }
            return told;
        }"""
    )
    assert found == []


def _lightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3]))


def test_a_click_on_a_point_opens_what_is_behind_it_and_escape_closes_it(
    opened: Open, report: Path, study: Content
) -> None:
    page = opened(report)
    run_id, x, y = free_point(page)
    page.mouse.click(x, y)
    dialog = page.locator("dialog#run[open]")
    dialog.wait_for()
    told = study.details[run_id]
    assert page.evaluate("location.hash") == f"#run={run_id}"
    assert dialog.locator("h2").text_content() == told["label"]
    assert dialog.locator(".plots figure").count() == len(told["curves"])
    assert dialog.locator("tbody tr").count() == len(told["scores"])
    shown = dialog.locator("dl.facts div").all_text_contents()
    assert len(shown) == len(told["config"]) + len(told["cost"])
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    until(page, "location.hash", "")


def test_the_keyboard_alone_opens_a_run(opened: Open, report: Path) -> None:
    page = opened(report)
    page.locator("#all-runs summary").focus()
    page.keyboard.press("Enter")
    link = page.locator("#table-runs tbody a").first
    link.focus()
    page.keyboard.press("Enter")
    page.locator("dialog#run[open]").wait_for()
    assert page.evaluate("document.activeElement.id") == "run-heading"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "close"
    page.keyboard.press("Enter")
    page.locator("dialog#run[open]").wait_for(state="detached")
    assert link.evaluate("each => each === document.activeElement")


def test_an_address_with_a_run_opens_it_also_one_that_is_not_there(opened: Open, report: Path, study: Content) -> None:
    run_id = list(study.details)[5]
    page = opened(report, hash=f"#run={run_id}")
    assert page.locator("dialog[open] h2").text_content() == study.details[run_id]["label"]
    for strange in ("<img src=x onerror=window.ran=1>", "100%"):
        page.evaluate("strange => { location.hash = `#run=${strange}`; }", strange)
        page.locator("dialog[open] h2", has_text="No such run").wait_for()
        page.locator("#run-body", has_text=strange).wait_for()
    page.evaluate("location.hash = '#cost'")
    page.locator("dialog[open]").wait_for(state="detached")


def test_tables_are_filtered_and_sorted(opened: Open, report: Path, study: Content) -> None:
    page = opened(report)
    page.locator("#all-runs summary").click()
    page.locator("[data-filters=table-runs]").fill("vicuna_7b DPO beavertails")
    rows = page.locator("#table-runs tbody tr:visible")
    wanted = [
        each["label"]
        for each in study.details.values()
        if all(word in each["label"] for word in ("vicuna_7b", "dpo", "beavertails"))
    ]
    assert rows.count() == len(wanted) > 0
    assert page.locator("[data-count-of=table-runs]").text_content() == f"{len(wanted)} of {len(study.details)} rows"
    head = page.locator("#table-comparisons thead th", has_text="difference")
    values = "[...document.querySelectorAll('#table-comparisons tbody tr')].map(r => Number(r.cells[2].dataset.sort))"
    for order, reverse in (("ascending", False), ("descending", True)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        found = page.evaluate(values)
        assert found == sorted(found, reverse=reverse)
        assert len(found) > 3


def test_samples_are_searched_and_chosen(opened: Open, report: Path, study: Content) -> None:
    page = opened(report)
    samples = page.locator("#sample-list")
    assert samples.locator(".prompt").count() == 20
    samples.get_by_role("button", name=re.compile(r"^Show \d+ more$")).click()
    assert samples.locator(".prompt").count() == len(study.answers)
    samples.locator("input[type=search]").fill("HAIKU")
    assert samples.locator(".prompt").count() == 1
    assert samples.locator("mark").all_text_contents() == ["haiku"]
    samples.locator("input[type=search]").fill("")
    samples.locator("select").select_option("red_instruct")
    (card,) = samples.locator(".prompt").all()
    assert not card.get_by_text("pick a lock").is_visible()
    card.get_by_text("May contain harmful text").click()
    assert card.get_by_text("pick a lock").is_visible()
    before = card.locator(".answer").count()
    assert before == 4
    card.get_by_role("button", name="2 more").click()
    assert card.locator(".answer").count() == 6
    samples.locator("details summary").first.click()
    samples.get_by_role("button", name="None").click()
    assert samples.locator(".prompt").count() == 0
    samples.locator(".chips input").first.check()
    assert samples.locator(".prompt .answer").count() == 1


def test_texts_of_models_stay_text_and_run_nothing(opened: Open, report: Path) -> None:
    page = opened(report)
    samples = page.locator("#sample-list")
    samples.get_by_role("button", name=re.compile(r"^Show \d+ more$")).click()
    found = set(samples.locator(".answer .text").all_text_contents())
    for text in HOSTILE:
        shown = text.replace("\ud800", "\ufffd")
        assert any(shown in each.replace("\ud800", "\ufffd") for each in found), json.dumps(text)
    assert page.locator("#sample-list script, #sample-list img").count() == 0
    turned = samples.locator(".answer .text", has_text=OVERRIDE).first
    style = turned.evaluate("each => [getComputedStyle(each).unicodeBidi, getComputedStyle(each).whiteSpace]")
    assert style == ["isolate", "pre-wrap"]
    haiku = samples.locator(".answer .text", has_text="Red leaves").first
    assert haiku.evaluate("each => each.getClientRects()[0].height") > 3 * 14


def test_a_script_that_came_into_the_page_would_not_run(browser: Any, report: Path, tmp_path: Path) -> None:
    """What the policy is for, if all else failed."""
    harm = (
        "<script>window.ran = 1</script><button onclick='window.ran = 1'>harm</button><img src='http://localhost:9/x'>"
    )
    harmed = tmp_path / "harmed.html"
    harmed.write_text(report.read_text(encoding="utf-8").replace("</main>", f"{harm}</main>"), encoding="utf-8")
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    refused: list[str] = []
    failed: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.on("requestfailed", lambda asked: failed.append(asked.failure))
    page.goto(harmed.as_uri())
    page.locator("html[data-drawn]").wait_for(state="attached")
    page.get_by_role("button", name="harm").click()
    assert page.evaluate("window.ran") is None
    assert sum("Content Security Policy" in text for text in refused) >= 3
    assert all("csp" in text.lower() for text in failed)
    page.close()


def test_the_theme_is_switched_and_kept(opened: Open, report: Path) -> None:
    page = opened(report)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Switch to dark colours").click()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert _lightness(dark) < _lightness(light)
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    page.emulate_media(media="screen")
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_what_a_chart_shows_is_chosen(opened: Open, report: Path) -> None:
    page = opened(report)
    figure = page.locator("#figure-tradeoff")
    marks = "[...document.querySelectorAll('#figure-tradeoff .mark-symbol path')].map((each) => each.__data__.datum)"
    runs = f"{marks}.filter((each) => each.run_id)"
    both = page.evaluate(f"{runs}.length")
    assert both > 100
    figure.get_by_label("dataset all").select_option("hh_rlhf")
    until(page, f"{runs}.every((each) => / hh_rlhf|^hh_rlhf|baseline/.test(each.label))", True)
    assert 0 < page.evaluate(f"{runs}.length") < both
    title = "[...document.querySelectorAll('#figure-tradeoff .role-axis-title text')].map((each) => each.textContent)"
    assert "bbh" not in "".join(page.evaluate(title))
    figure.get_by_label("Across").select_option(label="bbh exact_match (higher is better)")
    until(page, f"{title}[0]", "bbh exact_match (higher is better)")


def test_a_chart_is_saved_without_asking_anyone(opened: Open, report: Path) -> None:
    page = opened(report)
    for kind in ("SVG", "PNG"):
        with page.expect_download() as waited:
            page.locator("#figure-tradeoff").get_by_role("button", name=f"Save as {kind}").click()
        assert waited.value.suggested_filename == f"tradeoff.{kind.lower()}"


def test_a_sweep_of_which_nothing_is_done_has_a_page(opened: Open, tmp_path: Path) -> None:
    page = opened(write_page(content(done=0), tmp_path), size=PHONE)
    assert page.locator("main section").count() == 11
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#all-runs summary").click()
    page.locator("#table-runs tbody a").first.click()
    page.locator("dialog[open]").get_by_text("It has no scores.").wait_for()


def test_a_point_of_a_cell_with_one_seed_opens_its_run(opened: Open, tmp_path: Path) -> None:
    page = opened(write_page(content((*STUDY, "seed=0")), tmp_path))
    run_id, x, y = free_point(page)
    page.mouse.click(x, y)
    page.locator("dialog#run[open]").wait_for()
    assert page.evaluate("location.hash") == f"#run={run_id}"
    page.keyboard.press("Escape")
    x, y = page.evaluate(
        """() => {
            const line = document.querySelector('#figure-tradeoff .mark-line path');
            const to = line.getScreenCTM();
            for (let at = 0; at < line.getTotalLength(); at += 1) {
                const {x, y} = line.getPointAtLength(at).matrixTransform(to);
                if (document.elementFromPoint(x, y) === line) return [x, y];
            }
        }"""
    )
    page.mouse.click(x, y)
    page.wait_for_timeout(200)
    assert page.locator("dialog[open]").count() == 0, "the front's line is of no run"


def test_names_of_files_in_a_chart_are_text(opened: Open, study: Content, tmp_path: Path) -> None:
    """A tooltip is the one place where Vega writes HTML."""
    figure = next(each for each in study.figures if each.name == "tradeoff")
    rows = [each | {"label": HOSTILE[0]} for each in figure.spec["datasets"]["runs"][:3]]
    harmed = dataclasses.replace(figure, spec=figure.spec | {"datasets": {"runs": rows, "cells": [], "front": []}})
    page = opened(write_page(dataclasses.replace(study, figures=[harmed]), tmp_path))
    page.mouse.move(*free_point(page)[1:])
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert HOSTILE[0][:20] in tooltip.text_content()
    assert tooltip.locator("img, script").count() == 0
