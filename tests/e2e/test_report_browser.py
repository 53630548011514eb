"""The report in a real browser (headless Chromium): it draws, filters, fetches nothing, and runs nothing a model wrote."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from run_folders import INJECTED, make_pipeline, make_run, make_sweep
from smolmlx import cli

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    pytest.importorskip("vl_convert", reason="vl-convert is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as engines:
        # Chromium's sandbox does not work for root, which is who runs tests in a container.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = engines.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of one run and of two, written by the command line."""
    pytest.importorskip("vl_convert", reason="vl-convert is not installed")
    folder = tmp_path_factory.mktemp("reports")
    make_run(folder / "runs" / "notes-sft-20261121-081316-b00e", rows=24)
    make_run(folder / "runs" / "notes-sft-20261121-091316-c11f", rows=24, seed=1, skill=0.3, rate=1e-3, stages=("sft",))
    one = next((folder / "runs").glob("*b00e"))
    sweep = make_sweep(folder / "sweep-my")
    pipeline = make_pipeline(folder / "notes-pipeline-20261121-081316-b00e")
    for arguments in (
        [str(one)],
        [str(pipeline), "--out", str(folder / "pipeline.html")],
        [str(sweep)],
        [str(folder / "runs"), "--out", str(folder / "two.html"), "--title", "Two <rates>"],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["smolmlx", "report", *arguments])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert not stop.value.code
    shutil.copy(one / "report.html", folder / "one.html")
    shutil.copy(sweep / "report.html", folder / "sweep.html")
    return folder


@dataclass
class Watched:
    """A page with everything it said and asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def look_everywhere(self) -> None:
        """Open every fold around a chart and wait until each chart is drawn."""
        self.page.evaluate("document.querySelectorAll('details:has([data-chart])').forEach((d) => { d.open = true })")
        for figure in self.page.locator("[data-chart]").all():
            figure.scroll_into_view_if_needed()
            figure.locator("svg.marks").wait_for()

    def count(self) -> str:
        return self.page.locator("details[data-board='0'] .count").inner_text()

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f"details[data-board='0'] select[name={name}]").select_option(value)


def watch(browser: Browser, path: Path, **how: Any) -> Watched:
    watched = Watched(browser.new_page(**how))
    watched.page.on("console", lambda message: watched.said.append(f"{message.type}: {message.text}"))
    watched.page.on("pageerror", lambda error: watched.said.append(str(error)))
    watched.page.on("request", lambda request: watched.asked.append(request.url))
    watched.page.goto(path.as_uri())
    return watched


PHONE = {"viewport": {"width": 390, "height": 844}}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("one.html", {"color_scheme": "light"}),
        ("two.html", {"color_scheme": "dark"}),
        ("one.html", PHONE),
        ("two.html", PHONE),
        ("sweep.html", {"color_scheme": "light"}),
        ("sweep.html", {"color_scheme": "dark", **PHONE}),
        ("pipeline.html", {"color_scheme": "light"}),
        ("pipeline.html", PHONE),
    ],
    ids=[
        "one light",
        "two dark",
        "one phone",
        "two phone",
        "sweep light",
        "sweep dark phone",
        "pipeline light",
        "pipeline phone",
    ],
)
def test_draws_all_without_a_word_or_a_request(browser: Browser, reports: Path, name: str, how: dict[str, Any]) -> None:
    watched = watch(browser, reports / name, **how)
    watched.look_everywhere()
    assert watched.said == []
    assert watched.asked == [(reports / name).as_uri()], "the file itself and nothing else"
    width = watched.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], "the page must not scroll sideways"
    assert watched.page.locator("[data-chart] svg").count() >= 8
    watched.page.close()


def test_a_script_in_an_answer_stays_text(browser: Browser, reports: Path) -> None:
    watched = watch(browser, reports / "one.html")
    watched.look_everywhere()
    card = watched.page.locator("details[data-board='0'] .card").first
    assert INJECTED in card.inner_text()
    assert watched.page.locator("img").count() == 0
    assert watched.page.evaluate("window.injected") is None
    # Even a script that got into the page would not run: the policy names the two that may.
    watched.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.injected = true'}))"
    )
    assert watched.page.evaluate("window.injected") is None
    assert any("Content Security Policy" in line for line in watched.said)
    watched.page.close()


def test_a_sweep_can_be_read_from_settings_to_answers(browser: Browser, reports: Path) -> None:
    watched = watch(browser, reports / "sweep.html")
    heads = watched.page.locator("table.settings tbody th").all_inner_texts()
    assert [head.split("\n")[0] for head in heads] == ["baseline", "r 64", "lr <1e-4>", "base", "copy control", "random control"]  # fmt: skip
    assert "± " in watched.page.locator("table.settings tbody tr").first.inner_text()
    cards = watched.page.locator("details[data-board='0'] .card")
    shown = cards.first.locator(".answers h4").all_inner_texts()
    assert shown[:2] == ["base", "baseline, seed 0"] and len(shown) == 6, "five runs beside the base"
    watched.page.locator("details[data-board='0'] input[name=show][value='4']").uncheck()
    assert cards.first.locator(".answers h4").count() == 5 and watched.said == []
    watched.page.close()


def test_a_title_stays_text(browser: Browser, reports: Path) -> None:
    watched = watch(browser, reports / "two.html")
    assert watched.page.locator("h1").inner_text() == "Two <rates>"
    watched.page.close()


def test_the_viewer_filters_searches_and_sorts(browser: Browser, reports: Path) -> None:
    watched = watch(browser, reports / "one.html")
    assert watched.count() == "24 of 24 rows, the first 8 shown"
    cards = watched.page.locator("details[data-board='0'] .card")
    assert cards.count() == 8 and cards.first.locator(".answers > div").count() == 3

    watched.choose("system", "3")
    watched.choose("outcome", "flawed")
    flawed = int(watched.count().split()[0])
    watched.choose("outcome", "clean")
    assert 0 < flawed < 24 and int(watched.count().split()[0]) == 24 - flawed
    watched.choose("outcome", "all")

    watched.choose("flaw", "text before the first header")
    assert 0 < int(watched.count().split()[0]) < 24
    for shown in cards.all():
        assert "text before the first header" in shown.locator(".answers > .trained").first.inner_text()
    watched.choose("flaw", "")

    watched.choose("order", "low")
    scores = [
        float(text.split()[1]) for text in cards.locator(".answers > .trained:nth-child(2) .small").all_inner_texts()
    ]
    assert scores == sorted(scores) and scores[0] < scores[-1]

    watched.page.locator("details[data-board='0'] input[name=search]").fill("notes-0482")
    assert watched.count() == "1 of 24 rows" and cards.first.locator("h4").first.inner_text() == "notes-0482"
    watched.page.locator("details[data-board='0'] input[name=search]").fill("")
    watched.page.locator("details[data-board='0'] .more").click()
    assert cards.count() == 24

    watched.page.locator("details[data-board='0'] input[name=show][value='1']").check()
    assert cards.first.locator(".answers > div").count() == 4
    assert watched.said == []
    watched.page.close()


def test_the_theme_can_be_switched(browser: Browser, reports: Path) -> None:
    watched = watch(browser, reports / "one.html", color_scheme="light")
    watched.look_everywhere()
    paper = "getComputedStyle(document.body).backgroundColor"
    light = watched.page.evaluate(paper)
    watched.page.locator("#theme").click()
    assert watched.page.evaluate(paper) != light and watched.said == []
    watched.page.close()
