"""Files of a run folder whose numbers were changed are refused by name, not believed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_runs import make_events, make_record, write_run, write_stages
from tunesmith.core.errors import InputError
from tunesmith.core.events import Rollback
from tunesmith.core.run_dir import (
    EVENTS_FILE,
    PLAN_FILE,
    RECORD_FILE,
    ROLLBACKS_FILE,
    STAGES_FILE,
    RunFolder,
    read_all_events,
    read_rollbacks,
    read_run_plan,
    read_run_record,
    require_run,
)
from tunesmith.core.sealed_json import SEAL_KEY, read_sealed_json, seal_json
from tunesmith.plan.stages import read_staged_plan
from tunesmith.session.run_list import summarize_run

CONTENT = {"loss": 0.1 + 0.2, "steps": 3, "text": "Größe \ud800", "none": None, "rows": [1, [True]]}


def iter_changed_numbers(value: Any) -> Iterator[None]:
    """Change each number of a JSON value in turn, and put it back."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        if isinstance(item, (dict, list)):
            yield from iter_changed_numbers(item)
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            value[key] = item + 1
            yield
            value[key] = item


def write_raw(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def test_what_was_sealed_is_read_back_in_any_format(tmp_path: Path) -> None:
    file = tmp_path / "any.json"
    file.write_bytes(seal_json(CONTENT))
    assert read_sealed_json(file) == CONTENT
    assert list(json.loads(file.read_bytes())) == [*CONTENT, SEAL_KEY]
    write_raw(file, json.loads(file.read_bytes()))  # on one line
    assert read_sealed_json(file) == CONTENT


def test_a_file_without_a_seal_is_taken_as_it_is(tmp_path: Path) -> None:
    write_raw(tmp_path / "any.json", CONTENT)
    assert read_sealed_json(tmp_path / "any.json") == CONTENT


@pytest.mark.parametrize("seal", [None, 3, "", "0" * 64, [], {}])
def test_a_damaged_seal_is_no_missing_one(seal: Any, tmp_path: Path) -> None:
    write_raw(tmp_path / "any.json", CONTENT | {SEAL_KEY: seal})
    with pytest.raises(InputError, match="changed since tunesmith wrote it") as caught:
        read_sealed_json(tmp_path / "any.json")
    assert caught.value.where == str(tmp_path / "any.json")
    assert f'remove its key "{SEAL_KEY}"' in caught.value.fix


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (PLAN_FILE, read_run_plan),
        (PLAN_FILE, require_run),
        (RECORD_FILE, read_run_record),
        (STAGES_FILE, read_staged_plan),
    ],
)
def test_any_changed_number_of_a_run_is_refused_by_name(
    name: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if name == STAGES_FILE:
        write_stages(run)
    else:
        write_run(run, record=make_record())
    content = json.loads((run / name).read_bytes())
    num_changed = 0
    for _ in iter_changed_numbers(content):
        num_changed += 1
        write_raw(run / name, content)
        with pytest.raises(InputError, match=r"changed since|format") as caught:
            read(run)
        assert caught.value.where == str(run / name)
        assert caught.value.fix
    assert num_changed > 20
    write_raw(run / name, content)
    read(run)


def test_the_list_of_runs_shows_no_changed_score(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record=make_record())
    assert summarize_run(run).state == "finished"
    content = json.loads((run / RECORD_FILE).read_bytes())
    content["comparisons"][0]["after"]["value"] += 0.1
    write_raw(run / RECORD_FILE, content)
    summary = summarize_run(run)
    assert (summary.state, summary.score) == ("unreadable", None)
    assert "changed since tunesmith wrote it" in summary.problem


def test_a_changed_number_of_an_event_is_refused_with_its_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", events=make_events())
    file = run / EVENTS_FILE
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    for number, line in enumerate(lines, start=1):
        for _ in iter_changed_numbers(line):
            file.write_text("".join(json.dumps(other) + "\n" for other in lines))
            with pytest.raises(InputError, match="changed since it was written") as caught:
                read_all_events(run)
            assert caught.value.where == f"{file}:{number}"
            assert "remove the line" in caught.value.fix
    for line in lines:
        del line["crc32"]  # written by an earlier version
    file.write_text("".join(json.dumps(other) + "\n" for other in lines))
    assert len(read_all_events(run)) == len(lines)


def test_rollbacks_are_sealed(tmp_path: Path) -> None:
    rollback = Rollback(step=4, to=2, kind="collapse", evidence="", change="", lr_factor=0.5)
    with RunFolder.create(tmp_path / "run") as folder:
        folder.record_rollback(rollback)
    file = tmp_path / "run" / ROLLBACKS_FILE
    assert [back.lr_factor for back in read_rollbacks(tmp_path / "run")] == [0.5]
    content = json.loads(file.read_bytes())
    content["rollbacks"][0]["lr_factor"] = 1.0
    write_raw(file, content)
    with pytest.raises(InputError, match="changed since tunesmith wrote it"):
        read_rollbacks(tmp_path / "run")
