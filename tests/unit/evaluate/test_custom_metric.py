"""A user's own metric: run only when allowed, in a process of its own; whatever it does, the item
is named."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tunesmith.core.errors import InputError
from tunesmith.evaluate import custom_metric
from tunesmith.evaluate.custom_metric import format_metric_name, refuse_code, score_answers
from tunesmith.recipe.fields import parse_custom_metric

PAIRS = [("Paris", "Paris"), ("paris!", "Paris"), ("", "Rome"), ("Grüße \ud800 ", "x")]
IDS = [f"test.jsonl:{n}" for n in range(1, 5)]


def write(folder: Path, body: str, name: str = "mine") -> str:
    file = folder / f"{name}.py"
    file.write_text(f"import math, os, sys, time\n\n\ndef score(answer, expected):\n    {body}\n")
    return f"{file}:score"


def test_each_pair_gets_what_the_function_says(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("HALF = 0.5\n")
    body = (
        "import beside; print('noise'); "
        "return answer == expected or beside.HALF * (len(answer) > 0)"
    )
    assert score_answers(write(tmp_path, body), PAIRS, IDS) == (1.0, 0.5, 0.0, 0.5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no such city')", r"raised ValueError: no such city \(mine\.py:5\)"),
        ("return math.nan", "returned nan, which is not a finite number"),
        ("return math.inf", "returned inf"),
        ("return None", "returned None"),
        ("return '1.0'", "returned '1.0', which is not a finite number"),
        ("return [1.0]", r"returned \[1\.0\]"),
        ("os._exit(0)", "ended its process"),
        ("sys.exit(0)", "raised SystemExit"),
        ("time.sleep(60)", r"takes over 0.5 seconds"),
        ("return score(answer, expected)", "raised RecursionError"),
    ],
)
def test_what_goes_wrong_names_the_item(
    tmp_path: Path, body: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom_metric, "ANSWER_SECONDS", 0.5 if "sleep" in body else 10.0)
    metric = write(tmp_path, f"if not answer: {body}\n    return 1")
    with pytest.raises(InputError, match=f"mine.py:score {message}") as refusal:
        score_answers(metric, PAIRS, IDS)
    assert refusal.value.where == "test.jsonl:3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def score(:\n", "raised SyntaxError"),
        ("import nothing_of_this_name\n", "raised ModuleNotFoundError"),
        ("", "raised AttributeError"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError, match=message) as refusal:
        score_answers(f"{tmp_path}/mine.py:score", PAIRS, IDS)
    assert refusal.value.where == f"{tmp_path}/mine.py"


def test_code_is_run_only_for_who_allows_it(tmp_path: Path) -> None:
    metric = write(tmp_path, "return 1")
    refuse_code([metric, "exact_match"], allow_code=True)
    refuse_code(["exact_match"], allow_code=False)
    with pytest.raises(InputError, match=r"mine\.py:score is code[\s\S]*--allow-code"):
        refuse_code(["exact_match", metric], allow_code=False)
    with pytest.raises(InputError, match="no such file"):
        refuse_code([f"{tmp_path}/none.py:score"], allow_code=True)


def test_a_name_is_a_file_and_a_function() -> None:
    assert parse_custom_metric("/a/b/mine.py:score") == (Path("/a/b/mine.py"), "score")
    assert [
        parse_custom_metric(name)
        for name in ("exact_match", "regex: x.py:y", "contains: a.py:b", "mine.py")
    ] == [None] * 4
    assert (format_metric_name("/a/b/mine.py:score"), format_metric_name("chrf")) == (
        "mine.py:score",
        "chrf",
    )


WRITE_TO_ALL = "[os.write(fd, TEXT) for fd in range(4, 9) if os.path.exists(f'/proc/self/fd/{fd}')]"


@pytest.mark.parametrize("text", ["b'abc\\n'", "b'7\\n'", "b'[]\\n'", "b'x' * 100_000"])
def test_lines_of_its_own_among_the_values_are_refused(tmp_path: Path, text: str) -> None:
    body = f"{WRITE_TO_ALL.replace('TEXT', text)}; return 1"
    with pytest.raises(InputError, match="writes lines of its own"):
        score_answers(write(tmp_path, body), PAIRS, IDS)


def test_nothing_waits_for_a_daemon_of_the_metric(tmp_path: Path) -> None:
    body = (
        "if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0: time.sleep(60)\n        os._exit(0)\n    return 1"
    )
    start = time.monotonic()
    assert score_answers(write(tmp_path, body), PAIRS[:1], IDS[:1]) == (1.0,)
    assert time.monotonic() - start < 40
