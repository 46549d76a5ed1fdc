"""Cards and reports are shared: the folders above a path of the user are not in them."""

from __future__ import annotations

import html
from pathlib import Path

import pytest

from tiny_runs import make_tiny_recipe, save_model_folder, train, write_eval_files
from tunesmith import api
from tunesmith.core.formatting import hide_folders


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model /home/ann/models/x of 1 GB", "model models/x of 1 GB"),
        ("at /home/ann/work files/rows.jsonl:3", "at rows.jsonl:3"),
        ("tunesmith eval '/home/ann/work files/run'", "tunesmith eval 'run'"),
        ("/home/ann/other", "other"),
        ("see /data/rows.jsonl and /data/else", "see rows.jsonl and /data/else"),
        ("~/mine/file", "file"),
        ("https://x.org/home/ann/page", "https://x.org/home/ann/page"),
        ("some-org/model at runs/run-1", "some-org/model at runs/run-1"),
        ("/usr/bin/python", "/usr/bin/python"),
    ],
)
def test_the_folders_of_the_user_are_hidden(text: str, expected: str) -> None:
    paths = [
        *("/home/ann/work files/rows.jsonl", "/home/ann/work files/run", "/data/rows.jsonl"),
        *("~/mine/file", "some-org/model", "runs/run-1", "/", ""),
    ]
    assert hide_folders(text, paths) == expected


def test_every_path_of_a_folder_is_hidden_whatever_comes_first() -> None:
    names = ("run", "model", "rows.jsonl")
    text = " ".join(f"/data/{name}" for name in (*names, "else"))
    for paths in (names, names[::-1]):
        assert hide_folders(text, [f"/data/{name}" for name in paths]) == (
            "run model rows.jsonl /data/else"
        )
    deep = [f"/home/ann/work/{name}" for name in names]
    assert hide_folders(" ".join(deep), deep) == "run model rows.jsonl"


def test_folders_are_hidden_as_the_text_writes_them() -> None:
    path = "/home/ann & bob/x"
    text = f"<b>{html.escape(path)}</b>"
    assert hide_folders(text, [path], html.escape) == "<b>x</b>"


@pytest.mark.promise
def test_what_is_shared_of_a_run_names_no_folder_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "ann_&_bob" / "secret place"
    home.mkdir(parents=True)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    model = save_model_folder(home / "model")
    for name in ("one", "two"):
        files = write_eval_files(home / "files")
        train(make_tiny_recipe(model, home / name, **files))
    run = home / "two" / "run"
    page = api.write_report(run).read_text()
    card = (run / "adapter" / "README.md").read_text()
    for text in (page, card):
        for part in ("ann_", "ann\\_", "secret", str(tmp_path)):
            assert part not in text
    assert "of model, trained on" in card
    assert "tunesmith eval 'run'" in html.unescape(page)
    for name in ("plan.json", "record.json"):
        assert str(home / "one") not in (run / name).read_text()
