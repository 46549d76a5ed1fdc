"""The page in a browser: no requests, an empty console, accessible, and nothing in it runs.

Needs Debian's chromium, playwright and axe (the extra `dev` has the last two)."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_page import write_hostile_run
from test_page_sections import make_answers, write_graded_run

import fake_runs
from tunesmith.core.events import GenerationSample, Score
from tunesmith.core.run_dir import (
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    read_events,
    read_run_record,
)
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
)
WAIT_SECONDS = 60  # five are few on a busy machine
playwright.expect.set_options(timeout=WAIT_SECONDS * 1000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""

pytestmark = [
    pytest.mark.promise,
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


def wait_for_frames(page: Any) -> None:
    """Let the page hear of sizes and of what was opened: of both it hears once a frame."""
    page.wait_for_timeout(200)
    frame = "new Promise((done) => requestAnimationFrame(done))"
    for _ in range(2):
        page.evaluate(frame)


def wait_until(page: Any, condition: str) -> None:
    """Wait until a JavaScript expression is true.

    Playwright's own `wait_for_function` evaluates an expression inside the page from the second
    look on, which the page's security policy forbids."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


def open_page(browser: Any, file: Path, **context: Any) -> Any:
    """Open a page and check that it requests only itself and logs nothing."""
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(WAIT_SECONDS * 1000)
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


@pytest.fixture(scope="module")
def graded_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything that a page can have, and 80 answers with 5 fields."""
    answers = [
        (add_fields(expected), add_fields(answered)) for expected, answered in make_answers()
    ]
    folder = tmp_path_factory.mktemp("graded") / "run"
    write_graded_run(folder, answers * 2)
    record = read_run_record(folder)
    events = list(read_events(folder))
    for step in (10, 20, 30):
        events.append(Score("probes", "forgotten", 0.05, 0.01, 0.1, 8, step))
        for metric in ("json_valid", "schema_valid", "field_f1", "exact_match"):
            events.append(Score("eval", metric, 0.5, 0.2, 0.8, 16, step))
    scales = fake_runs.make_scales(fake_runs.CHEAPER)
    comparisons = (*record.comparisons, fake_runs.FORGOT)
    record = replace(record, scales=scales, comparisons=comparisons, verdict=None, selected_step=30)
    files = {name: read_sealed_json(folder / name) for name in (EVAL_BEFORE_FILE, EVAL_AFTER_FILE)}
    other = folder.parent / "other"
    return write_report(fake_runs.write_run(other, record=record, events=events, files=files))


@pytest.fixture(scope="module")
def many_fields_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose answers have 20 fields, all of them wrong at times."""
    answers: list[tuple[str, str]] = []
    for number in range(40):
        expected = {f"field_{index}": number * index for index in range(20)}
        answered = expected | {f"field_{number % 20}": -1, "field_3": -2}
        answers.append((json.dumps(expected), json.dumps(answered)))
    folder = tmp_path_factory.mktemp("many_fields") / "run"
    write_graded_run(folder, answers)
    return write_report(folder)


def add_fields(text: str) -> str:
    return json.dumps(json.loads(text) | {"upload": "team", "closes": [1, 2], "date": "2026-01-01"})


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_is_accessible(browser: Any, graded_file: Path, scheme: str, width: int) -> None:
    page = open_page(
        browser, graded_file, color_scheme=scheme, viewport={"width": width, "height": 800}
    )
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    result = axe.Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
    page.get_by_role("button", name="Broken").click()
    assert axe.Axe().run(page).violations_count == 0


def test_staged_and_unfinished_runs_are_accessible(browser: Any, tmp_path: Path) -> None:
    runs = [
        fake_runs.write_stages(tmp_path / "stages"),
        fake_runs.write_run(tmp_path / "open", events=fake_runs.make_events(7)),
    ]
    for run in runs:
        assert axe.Axe().run(open_page(browser, write_report(run))).violations_count == 0


def count_stops(page: Any) -> int:
    """Press Tab through the page; return how many elements had the focus."""
    page.evaluate("document.body.focus()")
    stops = 0
    while stops < 200:
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        stops += 1
    return stops


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_the_page_is_short_and_has_few_stops(browser: Any, graded_file: Path, width: int) -> None:
    page = open_page(browser, graded_file, viewport={"width": width, "height": 900})
    wait_for_frames(page)
    height = page.evaluate("document.documentElement.scrollHeight")
    assert height <= (12_000 if width == 1440 else 25_000)
    assert 30 < count_stops(page) <= 60
    gap = "getComputedStyle(document.querySelector('#sample-filters [role=toolbar]')).columnGap"
    assert page.evaluate(gap) != "normal", "buttons stand apart"
    still = """() => [...document.querySelectorAll("[tabindex='0']")].filter((pane) =>
        pane.checkVisibility() && pane.scrollWidth <= pane.clientWidth
        && pane.scrollHeight <= pane.clientHeight).length"""
    assert page.evaluate(still) == 0, "only what scrolls is a stop"


def test_many_fields_add_few_stops(browser: Any, many_fields_file: Path) -> None:
    page = open_page(browser, many_fields_file, viewport={"width": 1440, "height": 900})
    wait_for_frames(page)
    assert count_stops(page) <= 60
    assert page.locator("button.chip").count() == 8
    assert axe.Axe().run(page).violations_count == 0


def test_text_in_charts_is_readable_on_a_phone(browser: Any, graded_file: Path) -> None:
    page = open_page(browser, graded_file, viewport={"width": 360, "height": 800})
    sizes = page.evaluate("""() => [...document.querySelectorAll(".chart svg")].map((svg) => {
        const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
        return scale * parseFloat(getComputedStyle(svg.querySelector("text")).fontSize);
    })""")
    assert sizes
    assert min(sizes) >= 11.5


def test_filters_and_search_by_keyboard(browser: Any, graded_file: Path) -> None:
    page = open_page(browser, graded_file, viewport={"width": 1000, "height": 800})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    rows = page.locator("#sample-list details.sample")
    status = page.locator("#sample-status")
    assert rows.count() == 10
    assert set(rows.locator(".outcome").all_inner_texts()) == {"still wrong"}, "they come first"
    page.get_by_role("button", name="Right now").focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("button", name="Right now").get_attribute("aria-pressed") == "true"
    assert status.inner_text().startswith("52 of 80 answers")
    page.get_by_label("Search").fill("t:7")
    playwright.expect(rows).to_have_count(7)  # t:7, and right ones of t:70 to t:79
    page.get_by_label("Search").fill("")
    playwright.expect(rows).to_have_count(10)
    page.get_by_role("button", name="Show more").press("Enter")
    assert rows.count() == 50
    assert page.evaluate(
        "document.activeElement === document.querySelectorAll('#sample-list summary')[10]"
    )
    page.keyboard.press("j")
    assert page.evaluate(
        "document.activeElement === document.querySelectorAll('#sample-list summary')[11]"
    )
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#sample-list .fields tr.right")).to_have_count(5)
    page.keyboard.press("k")
    assert page.locator("#sample-list [open]").count() == 1


def test_each_row_of_filters_is_one_stop(browser: Any, graded_file: Path) -> None:
    page = open_page(browser, graded_file)
    page.get_by_role("button", name="All").focus()
    focused = "document.activeElement.innerText"
    for key, start in (("ArrowRight", "Wrong now"), ("ArrowRight", "Right now")):
        page.keyboard.press(key)
        assert page.evaluate(focused).startswith(start)
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "chip"
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.nextElementSibling") is None, "round to the last"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "sample-search"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focused).startswith("Right now")


def test_the_list_of_answers_is_one_stop(browser: Any, graded_file: Path) -> None:
    page = open_page(browser, graded_file, viewport={"width": 1000, "height": 800})
    focused = """() => [...document.querySelectorAll("#sample-list summary")]
        .indexOf(document.activeElement)"""
    page.get_by_label("Search").focus()
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == 0
    for key, row in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("j", 2)):
        page.keyboard.press(key)
        assert page.evaluate(focused) == row
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "sample-more"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focused) == 2, "back at the row that had the focus"
    page.get_by_role("button", name="Right now").click()
    page.get_by_label("Search").focus()
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == 0, "a new list starts at its first row"


def test_a_wide_page_shows_the_open_answer_beside_the_list(browser: Any, graded_file: Path) -> None:
    page = open_page(browser, graded_file, viewport={"width": 1440, "height": 900})
    rows = page.locator("#sample-list details.sample")
    opened = page.locator("#sample-list details.sample[open]")
    assert opened.count() == 1, "the first one"
    list_box = page.locator("#sample-list").bounding_box()
    top = "document.querySelector('[open] .sample-body').getBoundingClientRect().top"
    for n in (1, 2):
        rows.nth(n - 1).locator("summary").press("j")
        playwright.expect(opened).to_have_count(1)
        playwright.expect(opened.locator(".fields tr")).to_have_count(6)
        assert rows.nth(n).get_attribute("open") is not None
        box = opened.locator(".sample-body").bounding_box()
        assert box["x"] > list_box["x"] + list_box["width"]
        assert box["height"] > 100
        wait_until(page, f"{top} >= 0 && {top} < innerHeight")
    opened.locator("pre").last.evaluate("node => { node.style.minHeight = '3000px'; }")
    bottom = "node => node.getBoundingClientRect().bottom"
    last = page.locator("#samples-here").evaluate(bottom)
    assert opened.locator(".sample-body").evaluate(bottom) <= last, "not into the next section"
    narrow = open_page(browser, graded_file, viewport={"width": 1000, "height": 900})
    assert narrow.locator("#sample-list details.sample[open]").count() == 0


def test_each_section_with_several_stops_can_be_skipped(browser: Any, graded_file: Path) -> None:
    page = open_page(browser, graded_file)
    long = page.locator("main > section:has(> h2)").evaluate_all("""all => all.slice(1, -1)
        .filter((one) => one.querySelectorAll("a:not(.skip), button, summary").length > 1)
        .map((one) => [one.id, one.nextElementSibling.id])""")
    links = page.locator("main > section > a.skip")
    skips = links.evaluate_all("""all => all.map((link) =>
        [link.parentElement.id, link.hash.slice(1)])""")
    assert len(skips) > 3
    assert skips == long
    hashes = [target for _, target in skips]
    links.first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == f"#{hashes[0]}"


def test_an_empty_filter_says_what_that_means(browser: Any, graded_file: Path) -> None:
    page = open_page(browser, graded_file)
    page.get_by_role("button", name="Broken 0").click()
    assert "broke no answer" in page.locator("#sample-list .empty").inner_text()
    page.get_by_label("Search").fill("nowhere")
    playwright.expect(page.locator("#sample-list .empty")).to_have_text(
        "No answer passes all filters."
    )


def test_a_field_leads_to_its_rows(browser: Any, graded_file: Path) -> None:
    page = open_page(browser, graded_file)
    page.locator("#errors a", has_text="28 wrong").first.click()
    assert page.locator("#sample-status").inner_text().startswith("28 of 80")
    assert page.get_by_role("button", name="flag 28").get_attribute("aria-pressed") == "true"
    hints = page.locator("#sample-list .sample-hint").all_inner_texts()
    assert set(hints) == {"flag"}
    page.get_by_role("button", name="flag 28").click()
    assert page.locator("#sample-status").inner_text().startswith("80 of 80")
    page.locator("#errors summary", has_text="By expected value").click()
    page.locator("#errors details a").first.click()
    assert page.locator("#sample-status").inner_text().startswith("20 of 80"), "the known ids"
    page.get_by_role("button", name="All").click()
    assert page.locator("#sample-status").inner_text().startswith("80 of 80")


def test_a_command_is_copied_or_selected(browser: Any, graded_file: Path) -> None:
    page = open_page(browser, graded_file)
    page.evaluate("window.setTimeout = () => 0")  # the word stays
    button = page.locator("button.copy").first
    button.click()
    playwright.expect(button).to_have_text(re.compile("Copied|Selected"))
    if button.inner_text() == "Selected":
        command = page.locator(".command code").first.inner_text()
        assert page.evaluate("getSelection().toString()").strip() == command.strip()


def test_hostile_text_runs_nothing(browser: Any, tmp_path: Path) -> None:
    page = open_page(browser, write_report(write_hostile_run(tmp_path / "run")))
    assert "owned" not in page.title()
    assert page.locator("img").count() == 0
    assert page.locator("#sample-list details.sample").count() == 4
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    wait_for_frames(page)
    assert page.locator("#sample-list .fields tbody tr").count() >= 3
    for link in page.locator("#errors a[data-rows]").all():
        link.click()
    page.get_by_role("button", name="All").click()
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    wait_for_frames(page)
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
    assert page.locator("h1").inner_text() == "Useful, not ready"
    assert page.locator("#results tbody tr").count() == 2
    assert page.locator("svg[role=img]").count() >= 4
    assert page.locator("#sample-list details.sample").count() == 10
    page.locator("#sample-list summary").first.click()
    assert page.locator("#sample-list .pane").first.is_visible()
    assert not page.locator("button.copy").first.is_visible()
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
    page = open_page(browser, file)  # about 1 s on idle cores
    playwright.expect(page.locator("details.sample")).to_have_count(10)
    page.get_by_label("Search").fill("t:9999")
    playwright.expect(page.locator("details.sample")).to_have_count(1)


def test_it_prints(browser: Any, graded_file: Path, tmp_path: Path) -> None:
    page = open_page(browser, graded_file, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert not page.locator("#sample-list").is_visible()
    assert page.locator(".print-only .sample").count() == 5
    page.pdf(path=str(tmp_path / "page.pdf"), format="A4")
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page[^s]", pdf)) <= 10


def test_the_page_is_small_and_soon_there(browser: Any, graded_file: Path) -> None:
    assert graded_file.stat().st_size < 2_000_000
    page = open_page(browser, graded_file)
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    wait_until(page, "performance.getEntriesByName('first-contentful-paint').length > 0")
    assert page.evaluate(paint) < 10_000  # milliseconds; about 200 on an idle machine
