"""The verb `runs`, ./recipe.yaml as the default recipe, and wrong names of runs."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from fake_runs import PLAN, make_record, write_run
from tunesmith.cli import run as run_commands
from tunesmith.core.evidence import RunVerdict
from tunesmith.core.run_dir import EVENTS_FILE, PLAN_FILE, RECORD_FILE
from tunesmith.core.sealed_json import read_sealed_json


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_lists_each_run_in_a_line(folder: Path, tunesmith: Callable[..., Any]) -> None:
    write_run(folder / "runs/done", record=make_record())
    write_run(folder / "runs/half")
    write_run(folder / "runs/hostile\x1b[2J")
    write_run(folder / "runs/[bold]:key:\\")
    damaged = write_run(folder / "runs/damaged")
    (damaged / PLAN_FILE).write_text("{")
    code, out, _ = tunesmith("runs")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert "exact_match" in lines["runs/done"]
    assert " 0.80 ±0.10 " in lines["runs/done"]
    assert "finished" in lines["runs/done"]
    assert "30/30" in lines["runs/done"]
    assert "unreadable" in lines["runs/damaged"]
    assert "\x1b" not in out
    assert "runs/[bold]:key:\\ " in out, "no markup, no emoji, no doubled backslash"
    assert all(line == line.rstrip() for line in out.splitlines())
    code, out, _ = tunesmith("runs", "--json")
    assert {run["state"] for run in json.loads(out)["runs"]} >= {"finished", "unreadable"}


def test_no_runs_says_how_to_start_one(folder: Path, tunesmith: Callable[..., Any]) -> None:
    (folder / "runs").mkdir()
    assert "tunesmith train" in tunesmith("runs")[1]
    assert tunesmith("runs", "nowhere")[0] == 2
    for other in ("--json", "--all"):
        code, _, err = tunesmith("runs", "--watch", other)
        assert (code, f"--watch and {other} cannot be combined" in err) == (2, True)
    assert "needs a terminal" in tunesmith("runs", "--watch")[2]


def test_older_runs_are_counted_and_shown_with_all(
    folder: Path, tunesmith: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_commands, "MAX_SHOWN_RUNS", 2)
    for number in range(5):
        run = write_run(folder / f"runs/n{number}", record=make_record())
        for name in (RECORD_FILE, EVENTS_FILE):
            os.utime(run / name, (1e9 + number, 1e9 + number))
    out = tunesmith("runs")[1]
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["runs/n4", "runs/n3"]
    assert "and 3 older: tunesmith runs --all" in out
    assert "runs/n2" not in out
    assert tunesmith("runs", "--all")[1].count("runs/n") == 5
    assert len(json.loads(tunesmith("runs", "--json")[1])["runs"]) == 5


def test_recipe_yaml_is_the_default_recipe(folder: Path, tunesmith: Callable[..., Any]) -> None:
    code, _, err = tunesmith("plan")
    assert (code, "fix: write one with `tunesmith init`" in err) == (2, True)
    code, _, err = tunesmith("plan", "--data", "none.jsonl")
    assert (code, "'model' is missing" in err) == (2, True)
    (folder / "recipe.yaml").write_text("model: nowhere\ndata: none.jsonl\n")
    code, _, err = tunesmith("plan", "--seed", "1")
    assert code == 2
    assert err.startswith("recipe: recipe.yaml\n")
    assert "'model' is missing" not in err
    # a model as a flag begins another recipe, whose data may stand in its stages
    for flag in ("--model", "--model-name-or-path"):
        code, _, err = tunesmith("plan", flag, "elsewhere", "--stage", "[{sft: {data: n.jsonl}}]")
        assert code == 2
        assert "recipe: recipe.yaml" not in err


def test_a_recipe_of_another_name_is_suggested(folder: Path, tunesmith: Callable[..., Any]) -> None:
    (folder / "compose.yaml").write_text("services:\n  model: x\n")
    assert "`tunesmith init`" in tunesmith("plan")[2], "that is no recipe"
    (folder / "r.yaml").write_text("# mine\nmodel: nowhere\ndata: none.jsonl\n")
    for words in (("plan",), ("train", "--seed", "1"), ("data", "check")):
        code, _, err = tunesmith(*words)
        assert code == 2
        assert err == (
            "error: command line: no recipe is named, and there is no recipe.yaml here\n"
            "  fix: pass r.yaml\n"
        )
    assert "did you mean 'model'" in tunesmith("plan", "--modl", "x")[2]
    assert "no recipe is named" not in tunesmith("plan", "--model", "x", "--data", "y")[2]
    for name in "dbca":
        (folder / f"{name}.yml").write_text("model_name_or_path: nowhere\n")
    assert "fix: pass one of a.yml, b.yml, c.yml, ...\n" in tunesmith("plan")[2]


@pytest.mark.parametrize("verb", ["chat", "resume", "report", "eval", "export"])
def test_a_wrong_name_of_a_run_is_refused(
    verb: str, folder: Path, tunesmith: Callable[..., Any]
) -> None:
    write_run(folder / "runs/invoice-1")
    options = ("--to", "peft") if verb == "export" else ()
    code, _, err = tunesmith(verb, "runs/invoce-1", *options)
    assert code == 2
    assert "`tunesmith runs` lists them" in err


def test_why_a_run_is_unreadable_is_not_cut(folder: Path, tunesmith: Callable[..., Any]) -> None:
    run = write_run(folder / "runs/old")
    content = read_sealed_json(run / PLAN_FILE)
    (run / PLAN_FILE).write_text(json.dumps(content | {"format": 1}))
    problem = tunesmith("runs", "--json")[1]
    message = json.loads(problem)["runs"][0]["problem"]
    assert len(message) > 60
    assert f"runs/old: {message}\n" in tunesmith("runs")[1], "a line below the table"


@pytest.mark.parametrize("columns", [66, 80, 120])
def test_a_narrow_terminal_breaks_no_line(
    columns: int, folder: Path, tunesmith: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    verdict = RunVerdict("useful, not ready", "35 of 80 answers are exactly right")
    for name in ("demo-1", "demo-1-2-epochs"):
        write_run(folder / "runs" / name, record=make_record(verdict=verdict))
    lines = tunesmith("runs")[1].splitlines()
    assert len(lines) == 3
    assert all(len(line) <= columns for line in lines)
    for line in lines[1:]:
        assert "useful, not ready" in line
        assert " 0.80 ±0.10 " in line
    assert ("model" in lines[0]) == (columns == 120)
    assert ("metric" in lines[0]) == (columns > 66)


def test_a_long_path_is_folded_and_other_columns_stay_in_line(
    folder: Path, tunesmith: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    path = "runs/" + "運行" * 15 + "/a"  # letters of two columns
    write_run(folder / path, record=make_record())
    write_run(folder / "runs/b", record=make_record())
    lines = tunesmith("runs")[1].splitlines()
    assert all(cell_len(line) <= 60 for line in lines)
    folded = [line.split()[0] for line in lines if "運" in line or line.endswith("/a")]
    assert "".join(folded) == path
    starts = {cell_len(line[: line.index("finished")]) for line in lines if "finished" in line}
    assert len(starts) == 1


def test_a_finished_run_shows_its_verdict(folder: Path, tunesmith: Callable[..., Any]) -> None:
    verdict = RunVerdict("useful, not ready", "35 of 80 answers are exactly right")
    write_run(folder / "runs/judged", record=make_record(verdict=verdict))
    assert "runs/judged  useful, not ready  " in tunesmith("runs")[1]
    summary = json.loads(tunesmith("runs", "--json")[1])["runs"][0]
    assert (summary["state"], summary["verdict"]) == ("finished", "useful, not ready")


@pytest.mark.parametrize("verb", ["chat", "resume", "report", "eval", "export", "runs"])
@pytest.mark.parametrize("name", ["a" * 300, "runs/" + "b" * 300 + "/c", "a/../" * 1000, "\x1b[2J"])
def test_an_impossible_name_is_the_users_input(
    verb: str, name: str, tunesmith: Callable[..., Any]
) -> None:
    options = ("--to", "peft") if verb == "export" else ()
    code, out, err = tunesmith(verb, name, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "\x1b" not in err


def test_the_model_has_the_room_that_the_other_columns_leave(
    folder: Path, tunesmith: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "a-model-with-a-name-of-36-characters"
    plan = replace(PLAN, recipe=PLAN.recipe | {"model": model})
    write_run(folder / "runs/a", plan=plan, record=make_record(plan=plan))
    shown: dict[int, str] = {}
    for columns in (86, 96, 160):
        monkeypatch.setenv("COLUMNS", str(columns))
        heading, line = tunesmith("runs")[1].splitlines()
        assert len(line) <= columns
        start = heading.index("model")
        shown[columns] = line[start:].split()[0]
    assert shown[160] == model
    assert 20 <= len(shown[86]) < len(shown[96]) < len(model)
    assert shown[86] == model[: len(shown[86]) - 1] + "…"
