"""The pages of `kdb serve` in a browser, on a warehouse of both real models.

Screenshots of every page go to $KDB_SCREENSHOTS, to be looked at; else to the test's temporary folder.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from helpers.served import Served, served
from playwright.sync_api import Browser, Error, Page, sync_playwright

pytestmark = pytest.mark.browser

MODEL = "model=gemma-3-270m"
PAGES = {
    "home": "/",
    "model": f"/model?{MODEL}",
    "model-chosen": f"/model?{MODEL}&dataset=world-cities&category=capital&category=month",
    "compare": "/compare?model=gemma-3-270m&model=smollm2-135m&category=capital",
    "prompts": f"/prompt?{MODEL}&category=capital",
    "prompt": f"/prompt?{MODEL}&dataset=knowledge&prompt=170",
    "labelled-text": "/prompt?dataset=world-cities&prompt=8",
    "layer": f"/layer?{MODEL}&layer=12",
    "category": "/category?category=capital",
    "dataset": "/dataset?dataset=world-cities",
    "dataset-of-facts": "/dataset?dataset=knowledge",
    "search": "/search?q=Paris",
    "table": "/tables/layer_scores?filter=component%3Dffn",
    "neuron": f"/neuron?{MODEL}&neuron=f11_960",
    "attention-neuron": f"/neuron?{MODEL}&neuron=a12.2_253",
    "head": f"/head?{MODEL}&layer=12&head=2",
    "queries": "/queries",
    "query": "/queries/top-heads?category=capital&k=3",
    "query-to-fill-in": "/queries/prompt-story",
    "query-depth": "/queries/layer-accuracy?dataset=world-cities",
    "sql": "/sql?q=SELECT+model%2C+layer%2C+avg(score)+AS+score+FROM+head_scores+GROUP+BY+ALL+ORDER+BY+ALL",
    "sql-refused": "/sql?q=DROP+VIEW+runs",
    "schema": "/schema",
    "login": "/login",
    "unknown": "/model?model=gpt-6",
}
ALL_SCREENS = [(width, scheme) for width in (1440, 1024, 390) for scheme in ("light", "dark")]
SCREENS = ALL_SCREENS if os.environ.get("KDB_SCREENSHOTS") else [(1440, "light"), (1024, "dark"), (390, "dark")]
"""Widths and colours in which each page is opened; screenshots are taken in all of them."""


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--demo") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.skip("there is no Chromium: make browser")
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(
                executable_path=executable,
                args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
            )
        except Error as error:
            pytest.skip(f"Chromium does not start: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


class Watched:
    """A page, what its console said, and what it asked of other hosts."""

    def __init__(self, page: Page, server: Served) -> None:
        self.page, self.server = page, server
        self.said: list[str] = []
        self.elsewhere: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        if urlsplit(url).netloc != urlsplit(self.server.url).netloc and not url.startswith("data:"):
            self.elsewhere.append(url)

    def open(self, path: str) -> Page:
        """Go there, and wait until every chart is drawn."""
        self.page.goto(self.server.url + path)
        self.page.wait_for_selector("[data-spec]:not([data-state])", state="detached", timeout=60_000)
        return self.page


@pytest.fixture
def watched(browser: Browser, server: Served, request: pytest.FixtureRequest) -> Iterator[Watched]:
    width, scheme = getattr(request, "param", (1440, "light"))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    yield Watched(context.new_page(), server)
    context.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("KDB_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("watched", SCREENS, indirect=True, ids=str)
@pytest.mark.parametrize("name", PAGES)
def test_page_shows_without_a_complaint_and_is_accessible(
    watched: Watched, name: str, screenshots: Path, request: pytest.FixtureRequest
) -> None:
    page = watched.open(PAGES[name])
    width, scheme = request.node.callspec.params["watched"]
    page.screenshot(path=screenshots / f"{name}-{width}-{scheme}.png", full_page=True)
    refused = "Failed to load resource: the server responded with a status of 404 (Not Found)"
    assert [text for text in watched.said if not (name == "unknown" and text == refused)] == []
    assert watched.elsewhere == []
    assert page.locator("[data-state=empty]").all_inner_texts() == []
    assert page.locator("h1").count() == 1
    # What is wide scrolls in its own frame; the page itself does not.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if (width, scheme) in ((1440, "light"), (390, "dark")):
        report = Axe().run(page).response
        assert len(report["passes"]) > 10
        serious = [v for v in report["violations"] if v["impact"] in ("serious", "critical")]
        assert [(v["id"], v["nodes"][0]["html"]) for v in serious] == []


def test_the_accessibility_check_can_fail(watched: Watched) -> None:
    watched.page.set_content("<html><body><img src='data:,'><input></body></html>")
    assert {"image-alt", "label"} <= {v["id"] for v in Axe().run(watched.page).response["violations"]}


def test_charts_are_drawn_as_vectors(watched: Watched) -> None:
    page = watched.open(PAGES["model"])
    drawn = page.locator("[data-state=drawn] svg")
    assert drawn.count() >= 4
    assert page.locator("[data-state=drawn] svg path").count() > 50


def test_a_link_leads_from_a_model_to_a_neurons_tokens(watched: Watched) -> None:
    page = watched.open("/")
    page.get_by_role("link", name="gemma-3-270m").first.click()
    neuron = page.locator("#knowledge td a[href*='/neuron?']").first
    name = neuron.inner_text()
    neuron.click()
    assert page.url.endswith(f"/neuron?model=gemma-3-270m&neuron={name}")
    assert page.locator(".chip").count() >= 10, "the tokens that it raises"
    page.locator("td mark").first.click()
    assert "Which tokens does the answer come from?" in page.locator("main").inner_text()
    assert watched.said == []


def test_sql_runs_from_the_keyboard_and_its_address_can_be_shared(watched: Watched, server: Served) -> None:
    page = watched.open("/sql")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.locator("#sql").focus()
    page.keyboard.type("SELECT 6 * 7 AS answer, 'a,b' AS \"text\"")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("section[aria-label=Answer]")
    assert page.locator("tbody td").first.inner_text() == "42"
    assert "s." in page.locator(".status").inner_text()
    shared = page.url
    other = watched.open(shared.removeprefix(server.url))
    assert other.locator("tbody td").first.inner_text() == "42"
    with page.expect_download() as download:
        page.get_by_role("link", name="csv").click()
    assert Path(download.value.path()).read_text() == 'answer,text\n42,"a,b"\n'


def test_rows_are_shown_a_page_at_a_time(watched: Watched) -> None:
    page = watched.open("/sql?q=SELECT+i+FROM+range(250)+t(i)")
    assert "Rows 1 to 100" in page.locator(".status").inner_text()
    page.get_by_role("link", name="Next rows").click()
    page.get_by_role("link", name="Next rows").click()
    assert "Rows 201 to 250" in page.locator(".status").inner_text()
    assert page.locator("tbody td").first.inner_text() == "200"
    assert page.get_by_role("link", name="Next rows").count() == 0


def test_a_saved_query_is_asked_by_its_form(watched: Watched) -> None:
    page = watched.open("/queries/top-heads")
    page.get_by_label("model", exact=True).select_option(["smollm2-135m"])
    page.get_by_label("category", exact=True).select_option(["capital"])
    page.get_by_label("k", exact=True).fill("2")
    page.get_by_role("button", name="Run").click()
    assert "model=smollm2-135m&category=capital" in page.url
    assert page.locator("section[aria-label=Answer] tbody tr").count() == 2
    page.get_by_label("k", exact=True).fill("two")
    page.get_by_role("button", name="Run").click()
    assert "expected an integer" in page.get_by_role("alert").inner_text()


def test_a_column_is_inserted_into_the_editor(watched: Watched) -> None:
    page = watched.open("/sql")
    page.locator("summary", has_text="layer_scores").first.click()
    page.get_by_role("button", name="component").locator("visible=true").first.click()
    assert page.locator("#sql").input_value() == "component"


def test_a_prompt_leads_to_the_next(watched: Watched) -> None:
    page = watched.open(PAGES["prompt"])
    assert "Kabul" in page.locator("h1").inner_text()
    assert "Afghanistan" in page.locator("main").inner_text()
    page.get_by_role("link", name="Next prompt").click()
    assert page.url.endswith("prompt=171")


def test_models_are_compared_rank_by_rank(watched: Watched) -> None:
    page = watched.open(PAGES["compare"])
    rows = page.get_by_role("region", name="Layers with the largest direct contribution").locator("tbody tr")
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    assert [row[2] for row in cells] == ["1", "2", "3", "4", "5"]
    assert cells[0][:2] == ["knowledge", "capital"]
    assert all(re.fullmatch(r"[af]\d+\s+\d\.\d+ \(n = \d+\)", cell) for cell in cells[0][3:5])


def test_tokens_of_a_prompt_are_chosen_by_keyboard_and_coloured_by_a_head(watched: Watched) -> None:
    page = watched.open(PAGES["prompt"])
    token = page.locator(".tok", has_text="Afghanistan")
    assert token.get_attribute("aria-pressed") == "true", "the token that adds most is chosen at first"
    told = page.locator(".reads li:visible")
    assert "Afghanistan" in told.inner_text()
    token.focus()
    page.keyboard.press("ArrowLeft")
    assert "Afghanistan" not in told.inner_text()
    before = token.get_attribute("class")
    page.locator("button[data-head]").last.click()
    assert token.get_attribute("class") != before
    assert watched.said == []


def test_the_numbers_of_a_chart_and_folded_charts_come_when_they_are_unfolded(watched: Watched) -> None:
    page = watched.open(PAGES["model"])
    figure = page.locator("figure").first
    figure.locator("figcaption summary", has_text="Table").click()
    figure.locator("[data-rows] tbody tr").first.wait_for()
    drawn = page.locator("[data-state=drawn]").count()
    page.locator(".further > summary").first.click()
    page.wait_for_function("before => document.querySelectorAll('[data-state=drawn]').length > before", arg=drawn)
    assert watched.said == []


def test_charts_fill_the_page_and_follow_its_width(watched: Watched) -> None:
    page = watched.open("/queries/layer-accuracy?dataset=world-cities&model=gemma-3-270m")
    drawn = page.locator("[data-state=drawn] svg").first
    wide = drawn.bounding_box()["width"]
    assert wide > 900
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_function("() => document.querySelector('[data-state=drawn] svg').getBoundingClientRect().width < 390")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_small_without_the_chart_library(server: Served, name: str) -> None:
    with server.client() as client:
        size = len(client.get(PAGES[name]).content)
        size += sum(len(client.get(f"/static/{file}").content) for file in ("kdb.css", "kdb.js"))
    assert size < 300_000
