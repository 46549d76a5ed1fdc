"""The page in a browser: no requests, an empty console, accessible, and nothing in it runs.

Needs Debian's chromium, playwright and axe (the extra `dev` has the last two)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_page import write_hostile_run

import fake_runs
from tunesmith.core.events import GenerationSample
from tunesmith.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
    # of the browser's driver
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser: Any, file: Path, **context: Any) -> Any:
    """Open a page and check that it requests only itself and logs nothing."""
    page = browser.new_context(**context).new_page()
    page.requests = []
    page.console = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("console", lambda message: page.console.append(message.text))
    page.on("pageerror", lambda error: page.console.append(str(error)))
    page.on("dialog", lambda dialog: (page.console.append("dialog"), dialog.dismiss()))
    page.goto(file.as_uri())
    assert page.requests == [file.as_uri()]
    assert page.console == []
    return page


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = tuple(
        fake_runs.make_pair(n, f"was {n % 3}", f"is {n % 2}", f"is {n % 4}") for n in range(200)
    )
    scales = fake_runs.make_scales(fake_runs.CHEAPER)
    record = fake_runs.make_record(samples=samples, scales=scales)
    return write_report(
        fake_runs.write_run(tmp_path_factory.mktemp("finished") / "run", record=record)
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_is_accessible(browser: Any, report_file: Path, scheme: str, width: int) -> None:
    page = open_page(
        browser, report_file, color_scheme=scheme, viewport={"width": width, "height": 800}
    )
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    result = axe.Axe().run(page)
    assert result.violations_count == 0, result.generate_report()


def test_staged_and_unfinished_runs_are_accessible(browser: Any, tmp_path: Path) -> None:
    runs = [
        fake_runs.write_stages(tmp_path / "stages"),
        fake_runs.write_run(tmp_path / "open", events=fake_runs.make_events(7)),
    ]
    for run in runs:
        assert axe.Axe().run(open_page(browser, write_report(run))).violations_count == 0


def test_filters_and_search_by_keyboard(browser: Any, report_file: Path) -> None:
    page = open_page(browser, report_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator("article").count() == 40
    page.get_by_role("button", name="Better").focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("button", name="Better").get_attribute("aria-pressed") == "true"
    assert "100 of 200 answers" in page.locator("#sample-status").inner_text()
    assert set(page.locator("article .outcome").all_inner_texts()) == {"better"}
    page.get_by_label("Search").focus()
    page.keyboard.type("question 78")
    playwright.expect(page.locator("article")).to_have_count(0)
    assert page.locator("#sample-status").inner_text().startswith("0 of 200")
    page.get_by_role("button", name="All").press("Space")
    assert page.locator("article h3 bdi").all_inner_texts() == ["test.jsonl:78"]
    page.get_by_label("Search").fill("")
    playwright.expect(page.locator("article")).to_have_count(40)
    page.get_by_role("button", name="Show more").press("Enter")
    assert page.locator("article").count() == 80
    assert page.evaluate(
        "document.activeElement.closest('article') === document.querySelectorAll('article')[40]"
    )


def test_hostile_text_runs_nothing(browser: Any, tmp_path: Path) -> None:
    page = open_page(browser, write_report(write_hostile_run(tmp_path / "run")))
    assert "owned" not in page.title()
    assert page.locator("img").count() == 0
    assert page.locator("article").count() == 2
    text = page.locator("#sample-list").inner_text()
    assert "U+202E" in text
    assert "U+0000" in text
    assert "</script><script>" in text
    assert not set("\u202e\x00\ud800") & set(page.locator("body").inner_text())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.console == []
    injected = """() => {
        const script = document.createElement("script");
        script.textContent = "window.ran = 1";
        document.body.append(script);
        return window.ran;
    }"""
    assert page.evaluate(injected) is None
    assert "Content Security Policy" in page.console[0]


def test_it_is_readable_without_javascript(browser: Any, report_file: Path) -> None:
    page = open_page(browser, report_file, java_script_enabled=False)
    assert page.locator("h1").inner_text() == "The answers are better. General text got worse."
    assert page.locator("#results tbody tr").count() == 2
    assert page.locator("svg[role=img]").count() >= 4
    assert page.locator("article").count() == 5
    assert not page.locator("#sample-filters").is_visible()


def test_ten_thousand_answers_stay_usable(browser: Any, tmp_path: Path) -> None:
    long = " ".join(f"word{n}" for n in range(120))
    samples = tuple(
        (
            GenerationSample(0, f"t:{n}", long, f"{long} {n}", long),
            GenerationSample(1, f"t:{n}", long, f"{n % 7} {long}", long),
        )
        for n in range(10_000)
    )
    file = write_report(
        fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record(samples=samples))
    )
    start = time.perf_counter()
    page = open_page(browser, file)
    playwright.expect(page.locator("article")).to_have_count(40)
    assert time.perf_counter() - start < 8  # on two busy cores; about 1 s on idle ones
    start = time.perf_counter()
    page.get_by_label("Search").fill("t:9999")
    playwright.expect(page.locator("article")).to_have_count(1)
    assert time.perf_counter() - start < 3


def test_it_prints(browser: Any, report_file: Path, tmp_path: Path) -> None:
    page = open_page(browser, report_file, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    page.pdf(path=str(tmp_path / "page.pdf"), format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
