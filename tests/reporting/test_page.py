"""report.html as text: one file that loads nothing, in which no text of others is markup or script."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import page_material
import pytest
from page_material import HOSTILE, SMALL, content

from peft_align.reporting import page
from peft_align.reporting.page import Content
from peft_align.reporting.provenance import Provenance


class Parsed(HTMLParser):
    """What a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag in ("script", "style"):
            self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[-1][0]:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = attributes, before + data
        elif not self._open:
            self.text.append(data)

    def data(self, name: str) -> object:
        (found,) = [text for attributes, text in self.scripts if attributes.get("id") == f"data-{name}"]
        return json.loads(found)


@pytest.fixture(scope="module")
def small() -> Content:
    return content()


@pytest.fixture(scope="module")
def parsed(small: Content) -> Parsed:
    return Parsed(page.render(small))


def test_the_sections_stand_in_their_order_each_with_a_link_to_it(parsed: Parsed) -> None:
    order = ["found", "coverage", "tradeoff", "comparisons", "curves", "claims"]
    order += ["published", "samples", "cost", "failures", "methods"]
    assert [attributes["id"] for tag, attributes in parsed.tags if tag == "section"] == order
    links = [attributes["href"] for tag, attributes in parsed.tags if tag == "a"]
    assert [link for link in links if link in {f"#{name}" for name in order}][1:] == [f"#{name}" for name in order]


def test_headings_go_down_one_level_at_a_time(parsed: Parsed) -> None:
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_every_id_is_there_once(parsed: Parsed) -> None:
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_nothing_is_loaded_from_another_place(parsed: Parsed) -> None:
    for tag, attributes in parsed.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form", "video", "audio", "img")
        for name in ("src", "srcset", "action", "poster", "data", "background"):
            assert name not in attributes, (tag, attributes)
        if "href" in attributes:
            assert re.match("#|data:,$", attributes["href"] or ""), attributes
    text = (page.ASSETS / "page.css").read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text


def test_the_policy_lets_run_the_two_scripts_of_the_page_and_nothing_else(parsed: Parsed) -> None:
    (policy,) = [a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    run = [text for attributes, text in parsed.scripts if attributes.get("type") != "application/json"]
    assert rules["script-src"].split() == [f"'sha256-{page.digest(text)}'" for text in run]
    assert len(run) == 2


def test_texts_of_models_are_in_the_data_as_they_were_and_in_no_markup(parsed: Parsed) -> None:
    answers = parsed.data("answers")
    assert isinstance(answers, dict)
    shown = {one["answers"][0][1] for one in answers["prompts"]}
    assert set(HOSTILE) <= shown
    assert not any("window.ran" in text for text in parsed.text)
    assert all(not name.startswith("on") for _, attributes in parsed.tags for name in attributes)


def test_names_logs_and_reasons_that_mean_harm_are_text(small: Content) -> None:
    for text in HOSTILE:
        run_id = next(iter(small.details))
        details = {**small.details, run_id: {**small.details[run_id], "label": text, "reason": text}}
        rows = [{"run_id": run_id, "reason": text, "log_end": f"a\n{text}", text: text}]
        figure = dataclasses.replace(small.figures[0], title=text, caption=text)
        came = Provenance(packages=rows, sentences=[text])
        harmed = dataclasses.replace(
            small, title=text, details=details, failures=rows, cost=rows, figures=[figure], provenance=came
        )
        found = Parsed(page.render(harmed))
        assert len(found.scripts) == 5
        assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
        assert page_material.OVERRIDE not in "".join(found.text)
        assert "\x1b" not in "".join(found.text)


def test_what_is_written_can_be_written_and_read_again(small: Content, tmp_path: Path) -> None:
    harmed = dataclasses.replace(small, title="half a \ud800 character", provenance=Provenance(commands=["\udfff"]))
    path = page.write_page(harmed, tmp_path / "sweep")
    assert path == tmp_path / "sweep" / "report.html"
    assert "half a" in path.read_text(encoding="utf-8")
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]


def test_keys_are_taken_out(small: Content) -> None:
    run_id = next(iter(small.details))
    key = "hf_" + "a1B2" * 9
    own = {**small.details[run_id], "config": {"hub.token": key}, "reason": f"refused {key}"}
    told = dataclasses.replace(
        small, details={run_id: own}, failures=[{"run_id": run_id, "reason": key, "log_end": key}]
    )
    assert key not in page.render(told)


def test_the_findings_are_told_what_is_shown_first(parsed: Parsed) -> None:
    text = " ".join(" ".join(parsed.text).split())
    assert "17 of 17 runs complete" in text
    assert "DPO against SFT, everyday_mc acc: higher (better) by 0." in text
    assert text.index("Differences that are shown") < text.index("DPO against SFT") < text.index("Not enough runs (")
    assert "No run failed." in text
    assert "No score was measured at more than one step" not in text


def test_a_verdict_is_a_word_and_a_shape(small: Content) -> None:
    found = page.render(small)
    assert re.search(r'<span class="shape" aria-hidden="true">▲</span> higher', found)
    assert re.search(r'<span class="shape" aria-hidden="true">·</span> not enough runs', found)


def test_a_sweep_of_which_nothing_is_done_says_so_in_every_section() -> None:
    found = Parsed(page.render(content(done=0)))
    text = " ".join(" ".join(found.text).split())
    assert "0 of 17 runs complete" in text
    for sentence in (
        "Not enough runs for any of the 8 claims.",
        "There is no run yet with a score on both sides of the trade-off.",
        "No comparison has a pair of cells yet.",
        "No score was measured at more than one step",
        "Of the 240 published numbers none is measured.",
        "No benchmark with generated answers was evaluated.",
        "No run is finished, so no cost is known.",
        "Nothing is recorded yet of versions, devices and data.",
    ):
        assert sentence in text
    assert [own["id"] for tag, own in found.tags if tag == "figure"] == ["figure-coverage"]
    assert text.count("OutOfMemoryError") >= 4  # the failed ones are told


def test_a_page_without_any_run_has_all_its_sections() -> None:
    nothing = dataclasses.replace(content((*SMALL, "seed=0"), done=0), details={}, failures=[], provenance=Provenance())
    found = Parsed(page.render(nothing))
    assert len([tag for tag, _ in found.tags if tag == "section"]) == len(page.SECTIONS)
    assert "No run has anything to show yet." in " ".join(found.text)


def test_a_figure_of_a_section_that_is_not_there_is_refused_instead_of_lost(small: Content) -> None:
    lost = dataclasses.replace(small.figures[0], section="colours")
    with pytest.raises(ValueError, match="no section colours"):
        page.render(dataclasses.replace(small, figures=[lost]))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """No bundle is known in this process, before or after."""
    page.vega.cache_clear()
    yield
    page.vega.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_the_vega_bundle_is_built_once_and_again_where_what_was_kept_is_damaged(
    small: Content, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = []

    def build(last: str) -> str:
        built.append(last)
        return "let vega;\n// ü\n"

    def write() -> None:
        page.vega.cache_clear()  # as another process
        assert "// ü" in page.write_page(small, tmp_path / "report").read_text(encoding="utf-8")

    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(page, "bundle", build)
    write()
    write()
    assert len(built) == 1
    (kept,) = (tmp_path / "cache").iterdir()
    for damaged in (kept.read_bytes()[:-3], b"alert(1)", b"\xff", b""):
        kept.write_bytes(damaged)
        write()
        write()
    assert len(built) == 5


@pytest.mark.usefixtures("forgotten")
def test_a_cache_that_cannot_be_written_is_done_without(
    small: Content, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(page, "bundle", lambda _: "let vega;")
    assert "let vega;" in page.write_page(small, tmp_path).read_text(encoding="utf-8")
