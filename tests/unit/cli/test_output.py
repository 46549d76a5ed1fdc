"""Whatever strangers write into models, rows, recipes and file names, no output controls the
terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import unicodedata
import warnings
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from tunesmith.cli import app
from tunesmith.cli.output import (
    TerminalConsole,
    escape_markup,
    hide_download_bars,
    print_result,
    write_stderr,
)
from tunesmith.cli.progress import Progress, measuring
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckpointSaved, CheckResult, GenerationSample, Score, StageStart
from tunesmith.core.formatting import escape_controls
from tunesmith.core.library_output import escape_library_output
from tunesmith.core.progress_log import logger

HOSTILE = (
    "\x1b]0;PWN\x1b\\\x1b[2J\x07\x08\r\x00\x7f\x9b2J\x85"
    "\u202e\u2066\u200b\u2028\ufeff\ud800\U000e0041"
)
VISIBLE = (
    "\\u{1b}]0;PWN\\u{1b}\\\\u{1b}[2J\\u{7}\\u{8}\\u{d}\\u{0}\\u{7f}\\u{9b}2J\\u{85}\\u{202e}"
    "\\u{2066}\\u{200b}\\u{2028}\\u{feff}\\u{d800}\\u{e0041}"
)


def find_hidden(text: str) -> list[str]:
    """Return the characters that control the terminal or cannot be seen."""
    return [
        character
        for character in text
        if character != "\n" and unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    ]


def test_every_control_character_is_visible() -> None:
    assert escape_controls(HOSTILE) == VISIBLE
    assert escape_controls(VISIBLE) == VISIBLE


@pytest.mark.parametrize(
    "text",
    ["", "a\\", "a\\\\", "\\", "[b]\\", "[b]\\\\\\", "\\[/]", "[/none]\\", "C:\\runs\\[red]x[/]"],
)
def test_escaped_markup_shows_the_text_as_it_is(text: str) -> None:
    """Also a backslash at the end, before a tag, a text, or nothing."""
    for before, after in (("", ""), ("[bold]", "[/]"), ("", " x"), ("[dim]", "[/] [red]y[/]")):
        shown = Text.from_markup(f"{before}{escape_markup(text)}{after}", emoji=False).plain
        assert shown == f"{text}{Text.from_markup(after.removeprefix('[/]')).plain}"


def test_every_character_of_unicode_is_shown_or_escaped() -> None:
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if character not in "\n\t\u200c\u200d":
            assert not find_hidden(escape_controls(character))


@pytest.mark.parametrize(
    "text", ["two\nlines\tand a tab", "héllo 你好 مرحبا", "👩‍👩‍👧 می‌خواهم", ""]
)
def test_text_of_people_stays(text: str) -> None:
    assert escape_controls(text) == text


def test_an_error_shows_what_it_quotes() -> None:
    error = InputError(f"key {HOSTILE}\nline 2", where=f"a\n{HOSTILE}", fix=HOSTILE)
    assert str(error) == f"a\\u{{a}}{VISIBLE}: key {VISIBLE}\\u{{a}}line 2\n  fix: {VISIBLE}"
    assert error.message == f"key {HOSTILE}\nline 2"


def make_table() -> Table:
    table = Table("column", HOSTILE, title=HOSTILE)
    table.add_row(Text(HOSTILE), HOSTILE)
    return table


def test_names_of_emoji_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(":key:", title=":key:")
    table.add_row("a:key:b")
    print_result(None, table, as_json=False)
    assert capsys.readouterr().out.count(":key:") == 3


@pytest.mark.parametrize("view", [HOSTILE, Text(HOSTILE, "bold"), make_table()])
def test_no_view_controls_the_terminal(
    view: str | Text | Table, capsys: pytest.CaptureFixture[str]
) -> None:
    print_result(None, view, as_json=False)
    output = capsys.readouterr().out
    assert not find_hidden(output)
    assert "\\u{1b}]0;PWN" in output.replace("\n", "")


def test_json_is_escaped_and_means_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    text = HOSTILE.replace("\ud800", "")
    print_result({text: text}, as_json=True)
    output = capsys.readouterr().out
    assert not find_hidden(output)
    assert json.loads(output)[text] == text


def test_styles_of_our_own_still_reach_a_terminal() -> None:
    stream = io.StringIO()
    console = TerminalConsole(file=stream, force_terminal=True, color_system="standard")
    console.print(Text.assemble((HOSTILE, "bold")), soft_wrap=True)
    assert stream.getvalue().startswith("\x1b[1m\\u{1b}]0;PWN")
    assert stream.getvalue().count("\x1b") == 2


def test_no_message_controls_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    write_stderr(f"warning: {HOSTILE}\n")
    assert capsys.readouterr().err == f"warning: {VISIBLE}\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_event_controls_the_terminal(is_terminal: bool) -> None:
    stream = io.StringIO()
    console = TerminalConsole(file=stream, force_terminal=is_terminal, color_system=None, width=999)
    events = (
        CheckResult(step=1, kind=HOSTILE, level="warn", evidence=HOSTILE),
        GenerationSample(step=1, id=HOSTILE, prompt=HOSTILE, answer=HOSTILE),
        CheckpointSaved(step=1, path=HOSTILE),
        StageStart(step=1, num_stages=2, name=HOSTILE, path=HOSTILE, steps=3),
        Score(HOSTILE, HOSTILE, 0.1, low=0.0, high=0.2, n=3, step=1),
    )
    with Progress(3, console) as progress:
        for event in events:
            progress.show_event(event)
        logger.info("%s[/x][bold]: 1 of 2", HOSTILE)
    with measuring(console):
        logger.info("%s[/x][bold]: 1 of 2", HOSTILE)
    assert "\x1b]0" not in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()
    if not is_terminal:
        assert not find_hidden(stream.getvalue())
        assert stream.getvalue().count("[/x][bold]: 1 of 2") == 2


def test_libraries_do_not_control_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    factory = logging.getLogRecordFactory()
    try:
        escape_library_output()
        handler = logging.StreamHandler(sys.stderr)
        library = logging.getLogger("some.library")
        library.addHandler(handler)
        library.warning("unknown key %s", HOSTILE)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            library.exception("cannot read")
        library.removeHandler(handler)
        thread = threading.Thread(target=int, args=(HOSTILE,))
        thread.start()
        thread.join()
        assert not find_hidden(warnings.formatwarning(HOSTILE, UserWarning, HOSTILE, 1))
    finally:
        logging.setLogRecordFactory(factory)
    output = capsys.readouterr().err
    assert not find_hidden(output)
    assert f"unknown key {VISIBLE}" in output
    assert f"\nValueError: {VISIBLE}" in output, "the traceback is shown, and is harmless"
    assert "invalid literal for int()" in output


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bars_of_downloads_are_drawn_on_terminals_only(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")  # what is set then is undone
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    hide_download_bars()
    assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == (None if is_terminal else "1")


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        ("plan", f"--{HOSTILE}", "1"),
        ("plan", "--lora_r", HOSTILE),
        ("plan", f"{HOSTILE.replace(chr(0), '')}.yaml"),
        (HOSTILE,),
        ("train", "--model", "m", "--data", HOSTILE.replace(chr(0), "")),
        ("report", HOSTILE.replace(chr(0), "")),
        ("export", "runs/x", "--to", HOSTILE),
        ("advise", f"--{HOSTILE}", "x"),
        ("compare", HOSTILE.replace(chr(0), ""), "base"),
    ],
)
def test_no_error_controls_the_terminal(
    words: tuple[str, ...],
    as_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        app.main([*words, *(["--json"] if as_json else [])])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert not find_hidden(captured.out + captured.err)


def test_a_line_break_in_a_name_adds_no_line_to_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a\nb").mkdir()
    for words in (("plan", "--model", "./a\nbc", "--data", "x"), ("plan", "./a\nb/x.yaml")):
        with pytest.raises(SystemExit):
            app.main(words)
        first, *rest = capsys.readouterr().err.splitlines()
        assert first.startswith("error: ")
        assert all(line.startswith("  ") for line in rest)
    listed = InputError("2 problems\n  a\nb: one\n  c: two", fix="d\ne")
    assert str(listed) == "2 problems\n  a\\u{a}b: one\n  c: two\n  fix: d\\u{a}e"


def test_a_traceback_does_not_control_the_terminal() -> None:
    code = (
        "import sys\nfrom tunesmith.cli import ending\n"
        "sys.excepthook = ending.explain_bug\nraise ValueError(chr(27) + '[2J')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not find_hidden(done.stderr)
    assert "ValueError: \\u{1b}[2J" in done.stderr
