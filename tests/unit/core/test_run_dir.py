"""The run folder: one writer, append-only events, checkpoints that can be trusted."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fake_runs
from tunesmith.cli import app
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.events import (
    EVENT_TYPES,
    CheckpointSaved,
    CheckResult,
    Event,
    GenerationSample,
    Rollback,
    Score,
    StageStart,
    TrainingEnd,
    TrainStep,
    compute_checksum,
)
from tunesmith.core.json_io import dump_json, read_json
from tunesmith.core.run_dir import (
    FAILED_CHECK,
    RunFolder,
    find_parent_run,
    pick_run_folder,
    read_all_events,
    read_events,
    read_failure,
    read_run_plan,
    require_run,
)
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.core.types import RUN_FORMAT

HOLDS = """
import sys, time
from pathlib import Path
from tunesmith.core.run_dir import RunFolder
from tunesmith.core.types import RUN_FORMAT
folder = RunFolder.create(Path(sys.argv[1]))
folder.write_json("plan.json", {"format": RUN_FORMAT})
print("ready", flush=True)
time.sleep(60)
"""


def step(number: int, loss: float = 1.0) -> TrainStep:
    return TrainStep(number, loss, 100, 20, 0.5, 1e-4, 1.0, 10**9)


def started(path: Path) -> RunFolder:
    folder = RunFolder.create(path)
    folder.write_json("plan.json", {"format": RUN_FORMAT, "steps": 10})
    return folder


def save(folder: RunFolder, number: int, content: bytes = b"weights", keep_last: int = 2) -> Path:
    with folder.checkpoint(number, metadata={"recipe": "abc"}, keep_last=keep_last) as target:
        (target / "adapter.safetensors").write_bytes(content)
    return folder.path / "checkpoints" / f"step-{number}"


def test_a_new_run_makes_its_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "runs" / "a") as folder:
        assert folder.attempt == 1
        folder.write_text("recipe.yaml", "model: tiny\n")
    assert (tmp_path / "runs" / "a" / "recipe.yaml").read_text() == "model: tiny\n"


def test_a_folder_that_holds_anything_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"not empty: thesis\.tex"):
        RunFolder.create(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_killed_start_left_is_no_content(tmp_path: Path) -> None:
    """Up to its plan a run can be begun again; from there on it can be resumed."""
    (tmp_path / ".tmp-plan.json-77-ab").write_text("{")
    (tmp_path / ".lock").write_text("77")
    (tmp_path / "events.jsonl").write_text("")
    (tmp_path / "fingerprint.json").write_text("{}")
    with RunFolder.create(tmp_path):
        assert not list(tmp_path.glob(".tmp-*"))
    (tmp_path / "events.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"not empty: events\.jsonl"):
        RunFolder.create(tmp_path)


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    started(tmp_path).close()
    with pytest.raises(InputError, match=r"not empty: plan\.json\n.*tunesmith resume"):
        RunFolder.create(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match="is a file"):
        RunFolder.create(tmp_path / "a")
    with pytest.raises(MachineError, match="cannot be written: Not a directory"):
        RunFolder.create(tmp_path / "a" / "b")


def test_fault_32_two_processes_cannot_share_a_folder_and_a_killed_one_does_not_block_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        for use in (RunFolder.create, RunFolder.open):
            with pytest.raises(InputError, match=f"in use by process {other.pid}"):
                use(path)
        other.send_signal(signal.SIGKILL)
    with RunFolder.open(path) as folder:
        assert (path / ".lock.pid").read_text() == str(os.getpid())
        assert folder.attempt == 1  # no event was written before
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").write_text("1")
    RunFolder.create(tmp_path / "empty").close()


def test_only_a_run_folder_can_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a run folder: there is no plan\.json"):
        RunFolder.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"choices": {}},
            f"run folder format 1 is not supported; this version reads format {RUN_FORMAT}",
        ),
        (
            {"format": RUN_FORMAT + 1},
            f"run folder format {RUN_FORMAT + 1} is not supported",
        ),
        ([], "not a JSON object"),
        *(
            ({"format": RUN_FORMAT, "plans": plans}, "not a plan")
            for plans in (None, 0, "", [], {})
        ),
        ({"plans": [3]}, "not a plan"),
        ({"plans": [{"format": 1}]}, "run folder format 1 is not supported"),
    ],
)
def test_a_folder_of_another_format_is_refused(
    content: object, message: str, tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_bytes(dump_json(content))
    for read in (RunFolder.open, require_run, read_run_plan):
        with pytest.raises(InputError, match=message):
            read(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "settings: not a mapping"),
        (None, "settings: not a mapping"),
        ("lora", "settings: not a mapping"),
        ({"other_tool": {"value": 1}}, "settings: unknown setting 'other_tool'"),
        ({"seed": 3}, "settings: seed has no value"),
        ({"seed": {"source": "rule"}}, "settings: seed has no value"),
        ({"seed": None}, "settings: seed has no value"),
        ({"seed": {"value": "many"}}, "seed"),
    ],
)
def test_a_damaged_setting_is_the_users_error_in_every_verb(
    settings: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record())
    file = run / "plan.json"
    plan = read_sealed_json(file)
    merged = plan["settings"] | settings if isinstance(settings, dict) else settings
    file.write_text(json.dumps(plan | {"settings": merged}))
    with pytest.raises(InputError, match=message):
        read_run_plan(run)
    for words in (["report"], ["resume"], ["eval"], ["export", "--to", "peft"], ["chat"]):
        with pytest.raises(SystemExit) as ended:
            app.main([words[0], str(run), *words[1:]])
        assert ended.value.code == 2, words
        assert "plan.json" in capsys.readouterr().err, words


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"type": "leap", "step": 1, "attempt": 1, "time": 1.0}', "it has no known type"),
        (b"[]", "it has no known type"),
        (b'{"type": "saved", "step": 1, "attempt": 1, "time": 1.0}', "path: Field required"),
        (b'{"type": "saved", "step": 1, "path": "a"}', "it has no attempt or time"),
    ],
)
def test_a_line_that_is_not_an_event_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(line + b"\n")
    with pytest.raises(InputError, match=rf"events\.jsonl:1: not an event.*{message}"):
        read_events(tmp_path)


def test_every_event_is_a_line_with_type_time_and_attempt(tmp_path: Path) -> None:
    events: list[Event] = [
        CheckResult("leak", "ok", "0.0"),
        Score("test", "loss", 2.0, 1.9, 2.1, 50, 0),
        step(1),
        GenerationSample(1, "a:1", "Hi", "line\u2028end"),
        CheckpointSaved(1, "checkpoints/step-1"),
        TrainingEnd(1, "finished", 3.0),
        StageStart(2, 2, "sft", 5, "stages/2-sft"),
    ]
    with started(tmp_path) as folder:
        for event in events:
            folder.append_event(event)
        lines = [
            json.loads(line) for line in (tmp_path / "events.jsonl").read_bytes().split(b"\n")[:-1]
        ]
    assert [line["type"] for line in lines] == [
        "verdict",
        "score",
        "step",
        "sample",
        "saved",
        "done",
        "stage",
    ]
    assert {line["type"] for line in lines} == EVENT_TYPES.keys()
    assert all(line["attempt"] == 1 and line["time"] > 1.7e9 for line in lines)
    assert lines[2].pop("crc32") == compute_checksum(lines[2])
    assert lines[2] | {"time": 0} == {
        "type": "step",
        "time": 0,
        "attempt": 1,
        "step": 1,
        "loss": 1.0,
        "tokens": 100,
        "supervised_tokens": 20,
        "seconds": 0.5,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "peak_bytes": 10**9,
        "task_tokens": {},
        "shared_tokens": 0,
    }
    assert read_events(tmp_path) == sorted(events, key=lambda event: event.step)
    assert [logged.attempt for logged in read_all_events(tmp_path)] == [1] * len(events)


def test_a_loss_that_is_not_a_number_is_never_recorded(tmp_path: Path) -> None:
    with started(tmp_path) as folder, pytest.raises(ValueError, match=r"step\.loss is nan"):
        folder.append_event(step(1, float("nan")))
    assert read_events(tmp_path) == []


def test_readers_take_the_last_attempt_of_a_step_in_order(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        for number in (1, 2, 3):
            folder.append_event(step(number, loss=10.0 + number))
        folder.append_event(Score("eval", "loss", 1.0, 0.9, 1.1, 5, 1))
    with RunFolder.open(tmp_path) as folder:
        assert folder.attempt == 2
        folder.append_event(step(2, loss=20.0))
        events = folder.load_events()
    assert [(event.step, getattr(event, "loss", None)) for event in events] == [
        (1, 11.0),
        (1, None),
        (2, 20.0),
        (3, 13.0),
    ]


def test_a_rollback_keeps_the_checkpoint_that_it_goes_back_to(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        for number in (1, 2, 3):
            save(folder, number, keep_last=3)
        folder.record_rollback(Rollback(4, 2, "spike", "", ""))
        assert folder.list_saved_steps() == [2, 1]


def test_every_opening_and_every_rollback_starts_an_attempt(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        for number in (1, 2, 3):
            folder.append_event(step(number, loss=10.0))
    with RunFolder.open(tmp_path) as folder:
        folder.append_event(step(3, loss=20.0))
        first = folder.record_rollback(Rollback(3, 1, "spike", "", ""))
        assert (folder.attempt, first[0].attempt) == (3, 2)
        folder.append_event(step(2, loss=30.0))
        second = folder.record_rollback(Rollback(2, 1, "spike", "", ""))
        assert (folder.attempt, [rollback.attempt for rollback in second]) == (4, [2, 3])
    logged = [(event.attempt, event.event.step) for event in read_all_events(tmp_path)]
    assert logged == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 2)]
    with RunFolder.open(tmp_path) as folder:  # no event has the number of the last rollback
        assert folder.attempt == 4
        assert folder.load_events() == [step(1, loss=10.0)]
        folder.append_event(step(2, loss=40.0))
        assert folder.load_events() == [step(1, loss=10.0), step(2, loss=40.0)]


@pytest.mark.parametrize("folder", ["stages", "other"])
def test_a_stage_belongs_to_the_run_whose_stages_it_is_in(folder: str, tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text("{}")
    stage = tmp_path / folder / "1-sft"
    stage.mkdir(parents=True)
    assert find_parent_run(stage) == (tmp_path if folder == "stages" else stage)
    (tmp_path / "stages.json").unlink()
    assert find_parent_run(stage) == stage


def test_a_torn_last_line_is_left_out_and_stays_apart_from_what_follows(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        folder.append_event(step(1))
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"type": "step", "time": 1, "att')
    assert [event.step for event in read_events(tmp_path)] == [1]
    with RunFolder.open(tmp_path) as folder:
        folder.append_event(step(2))
    assert [event.step for event in read_events(tmp_path)] == [1, 2]


def test_a_first_line_that_is_torn_leaves_no_trace(tmp_path: Path) -> None:
    """The attempt before wrote nothing else, so the next one has its number."""
    started(tmp_path).close()
    (tmp_path / "events.jsonl").write_bytes(b'{"type": "verd')
    with RunFolder.open(tmp_path) as folder:
        assert folder.attempt == 1
        folder.append_event(step(1))
    assert [event.step for event in read_events(tmp_path)] == [1]


def test_a_line_that_is_just_being_written_is_left_out(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        folder.append_event(step(1))
        with (tmp_path / "events.jsonl").open("ab") as file:
            file.write(b'{"type": "step", "st')
        assert [event.step for event in folder.load_events()] == [1]


def test_only_a_failure_at_the_end_is_one(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        assert read_failure(tmp_path) == ""
        folder.append_event(CheckResult(FAILED_CHECK, "stop", "three times NaN", 4))
        assert read_failure(tmp_path) == "three times NaN"
        folder.append_event(step(5))
        assert read_failure(tmp_path) == ""


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        folder.append_event(step(1))
        with (tmp_path / "events.jsonl").open("ab") as file:
            file.write(b"garbage\n")
        folder.append_event(step(2))
    with pytest.raises(InputError, match=r"events\.jsonl:2: not JSON"):
        read_events(tmp_path)


def test_a_checkpoint_is_sealed_and_found(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        assert folder.find_latest_checkpoint() == (None, [])
        path = save(folder, 5)
        manifest = read_json(path / "manifest.json")
        assert (manifest["step"], manifest["recipe"]) == (5, "abc")
        assert folder.find_latest_checkpoint() == (path, [])


def test_the_newest_checkpoint_that_can_be_trusted_is_taken(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        old, new = save(folder, 9), save(folder, 10)
        (new / "adapter.safetensors").write_bytes(b"weightz")
        (tmp_path / "checkpoints" / "step-x").mkdir()
        (tmp_path / "checkpoints" / "step-11").mkdir()
        checkpoints, skipped = folder.find_latest_checkpoint()
        assert checkpoints == old
        assert [problem.partition(":")[0] for problem in skipped] == [
            "checkpoints/step-11",
            "checkpoints/step-10",
        ]
        assert [(path.name, bool(problem)) for path, problem in folder.iter_checkpoints()] == [
            ("step-11", True), ("step-10", True), ("step-9", False),
        ]  # fmt: skip


def test_old_checkpoints_go_but_never_below_what_can_be_trusted(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        for number in (1, 2, 3):
            save(folder, number)
        assert [path.name for path, _ in folder.iter_checkpoints()] == ["step-3", "step-2"]
        (tmp_path / "checkpoints" / "step-3" / "manifest.json").unlink()
        save(folder, 4)
        assert [path.name for path, _ in folder.iter_checkpoints()] == [
            "step-4",
            "step-3",
            "step-2",
        ]
        save(folder, 5, keep_last=1)
        assert [path.name for path, _ in folder.iter_checkpoints()] == ["step-5"]


def test_a_checkpoint_that_fails_leaves_the_one_before_and_no_traces(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        before = save(folder, 1)
        with pytest.raises(TypeError), folder.checkpoint(2, metadata={}) as target:
            (target / "half").write_bytes("a text")  # pyright: ignore[reportArgumentType]
        assert [path for path, _ in folder.iter_checkpoints()] == [before]
        with (
            pytest.raises(MachineError, match=r"bytes\) needed"),
            folder.checkpoint(2, metadata={}, needed_bytes=10**18),
        ):
            pytest.fail("the body must not run")
        assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def test_a_step_saved_again_replaces_what_was_there(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        save(folder, 1, b"first")
        assert (save(folder, 1, b"second") / "adapter.safetensors").read_bytes() == b"second"


def test_what_a_killed_process_left_is_removed_on_opening(tmp_path: Path) -> None:
    with started(tmp_path) as folder:
        save(folder, 1)
    (tmp_path / "checkpoints" / ".tmp-step-2-77-ab").mkdir()
    (tmp_path / ".tmp-plan.json-77-ab").write_text("{")
    with RunFolder.open(tmp_path) as folder:
        assert folder.find_latest_checkpoint() == (tmp_path / "checkpoints" / "step-1", [])
    names = {entry.name for entry in [*tmp_path.iterdir(), *(tmp_path / "checkpoints").iterdir()]}
    assert names == {".lock", ".lock.pid", "plan.json", "events.jsonl", "checkpoints", "step-1"}


def test_the_next_free_name(tmp_path: Path) -> None:
    assert pick_run_folder(tmp_path, "demo") == tmp_path / "demo-1"
    (tmp_path / "demo-1").mkdir()
    assert pick_run_folder(tmp_path, "demo") == tmp_path / "demo-2"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_with_what_helps(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No marker file in its place: a killed process would leave it, and block the run for good."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    started(tmp_path / "old").close()
    monkeypatch.setattr(fcntl, "flock", refuse)
    for name, use in (("new", RunFolder.create), ("old", RunFolder.open)):
        with pytest.raises(MachineError, match="this file system gives no file locks: ") as refused:
            use(tmp_path / name)
        assert refused.value.exit_code == 3
        assert "output_dir to a local disk" in refused.value.fix
    monkeypatch.undo()
    RunFolder.create(tmp_path / "new").close()
    RunFolder.open(tmp_path / "old").close()
