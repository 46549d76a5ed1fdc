"""Continued pretraining from recipe to record: texts in windows, counted in tokens, measured in
bits per byte."""

import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import tunesmith
from tiny_runs import (
    build_sum_rows,
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    select_steps,
    train,
    write_eval_files,
    write_rows,
)
from tunesmith.api import read_record
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult, Event, Score
from tunesmith.core.types import Json
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs
from tunesmith.train import run

pytestmark = pytest.mark.promise


def texts(first: int, count: int) -> list[Json]:
    return [
        {"text": f"Text number {n}. " + "It goes on and on. " * (n % 9)}
        for n in range(first, first + count)
    ]


def wish(model: Path, folder: Path, **changed: Any) -> Recipe:
    """Windows of 60 tokens, 200 tokens a step."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "stage": "cpt",
        "data": str(write_rows(folder / "texts.jsonl", texts(1, 30))),
        "max_length": 60,
        "batch_tokens": 200,
        "batch_size": "auto",
        "save_steps": 4,
    }
    return make_tiny_recipe(model, folder, **(values | changed))


def held_out(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "eval_data": str(write_rows(folder / "eval.jsonl", texts(40, 6))),
        "test_data": str(write_rows(folder / "test.jsonl", texts(50, 6))),
        "retention_data": write_eval_files(folder / "other")["retention_data"],
    }


def test_an_epoch_trains_every_token_of_every_text_once(tiny_folder: Path, tmp_path: Path) -> None:
    made = wish(tiny_folder, tmp_path)
    steps = select_steps(train(made))
    rows = texts(1, 30)
    assert sum(step.supervised_tokens for step in steps) == sum(
        len(row["text"].encode()) for row in rows
    )
    assert all(140 <= step.tokens <= 260 for step in steps[:-1])
    record = read_record(tmp_path / "run")
    assert record.plan.steps == len(steps) == -(-record.plan.data["data"].tokens // 200)
    assert record.plan.config.separator == "<|text|>"
    kinds = [verdict.kind for verdict in record.preflight]
    assert {"EOS between documents", "every token is a target once"} <= set(kinds)
    assert kinds[-1] == "negative controls"


def test_texts_are_measured_in_bits_per_byte_before_after_and_on_the_way(
    tiny_folder: Path, tmp_path: Path
) -> None:
    made = wish(tiny_folder, tmp_path, **held_out(tmp_path), num_train_epochs=4, eval_steps=5)
    events = train(made)
    actual = {item.task: item for item in read_record(tmp_path / "run").comparisons}
    assert {(task, item.metric) for task, item in actual.items()} == {
        ("test", "bits_per_byte"),
        ("general text", "bits_per_byte"),
    }
    assert actual["test"].high < 0, "the domain is learnt"
    looks = Counter(
        item.task
        for item in events
        if isinstance(item, Score) and 0 < item.step < len(select_steps(events))
    )
    assert looks["eval"] == looks["general text"] == (len(select_steps(events)) - 1) // 5
    again = {item.task: item for item in tunesmith.evaluate(tmp_path / "run").comparisons}
    assert again["test"].after.value == pytest.approx(actual["test"].after.value)


def test_a_run_goes_on_to_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    general = {
        "rehearsal": {
            "data": str(write_rows(tmp_path / "general.jsonl", texts(90, 20))),
            "ratio": 0.25,
        }
    }
    straight, broken = (
        wish(tiny_folder, tmp_path / name, **general) for name in ("straight", "broken")
    )
    events = train(straight)
    run_until_saved(run.train(plan_recipe(broken)), step=4)
    again = list(run.resume(tmp_path / "broken" / "run"))
    assert [step.loss for step in select_steps(again)] == [
        step.loss for step in select_steps(events)
    ][4:]
    assert read_adapter_bytes(broken) == read_adapter_bytes(straight)


def test_rehearsal_takes_the_place_of_windows(tiny_folder: Path, tmp_path: Path) -> None:
    general = str(write_rows(tmp_path / "general.jsonl", texts(90, 20)))
    made = wish(
        tiny_folder, tmp_path, rehearsal={"data": general, "ratio": 0.25}, num_train_epochs=3
    )
    steps = select_steps(train(made))
    plain = plan_recipe(wish(tiny_folder, tmp_path / "plain", num_train_epochs=3))
    assert len(steps) == plain.steps, "not a step more"
    total = sum(step.tokens for step in steps)
    assert sum(step.task_tokens.get("rehearsal", 0) for step in steps) / total == pytest.approx(
        0.25, abs=0.03
    )
    assert total == pytest.approx(200 * len(steps), rel=0.03)


def test_an_adaptive_rehearsal_takes_the_place_of_more_windows(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Steps stay as long as they were and as many, whatever the ratio becomes; going on gives the
    same bytes."""
    other = str(
        write_rows(tmp_path / "other.jsonl", [{"text": "more and more " * n} for n in range(1, 9)])
    )
    general = {
        "retention_data": str(
            write_rows(tmp_path / "kept.jsonl", [{"text": "おえういあ" * n} for n in (2, 3)])
        )
    }
    ratio = {
        "rehearsal": {"data": other, "ratio": "adaptive"},
        "max_steps": 10,
        "eval_steps": 2,
    } | general
    straight, broken = (
        wish(tiny_folder, tmp_path / name, learning_rate=0.03, **ratio) for name in ("one", "two")
    )
    steps = select_steps(train(straight))
    assert len(steps) == 10
    assert sum(step.tokens for step in steps) == pytest.approx(200 * len(steps), rel=0.03)
    shares = [step.task_tokens.get("rehearsal", 0) / step.tokens for step in steps]
    assert sum(shares[-4:]) / 4 == pytest.approx(0.5, abs=0.06), "doubled until it is a half"
    run_until_saved(run.train(plan_recipe(broken)), step=4)
    list(run.resume(tmp_path / "two" / "run"))
    assert read_adapter_bytes(broken) == read_adapter_bytes(straight)


def test_packing_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    item, many = (
        select_steps(
            train(wish(tiny_folder, tmp_path / str(length), pack_length=length, max_steps=3))
        )
        for length in (60, 400)
    )
    assert [step.loss for step in item] == pytest.approx([step.loss for step in many], rel=1e-4)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 4}, "batch_size has no effect with stage: cpt; set batch_tokens"),
        (
            {"on_overlong": "truncate"},
            "on_overlong has no effect with stage: cpt; long texts are cut into windows",
        ),
        ({"metrics": ["exact_match"]}, "metrics has no effect with stage: cpt"),
        ({"response_schema": "schema.json"}, "response_schema has no effect with stage: cpt"),
        ({"stage": "sft"}, "batch_tokens has no effect without stage: cpt; set batch_size"),
    ],
)
def test_what_a_stage_does_not_know_is_refused(
    changed: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        wish(tiny_folder, tmp_path, **changed)


def test_rows_that_are_no_texts_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("a").mkdir()
    chats = str(write_rows(tmp_path / "chats.jsonl", build_sum_rows(1, 6)))
    with pytest.raises(
        InputError, match="stage: cpt trains on plain text, but these are messages rows"
    ):
        inputs.load_inputs(wish(tiny_folder, tmp_path / "a", data=chats))
    both = str(
        write_rows(
            tmp_path / "both.jsonl", [row | {"body": "as a text"} for row in build_sum_rows(1, 6)]
        )
    )
    named = [{"path": both, "format": "text", "columns": {"text": "body"}}]
    assert inputs.load_inputs(wish(tiny_folder, tmp_path / "b", data=named)).corpus is not None


@pytest.mark.parametrize("role", ["eval_data", "test_data"])
def test_held_out_rows_that_are_no_texts_are_refused(
    role: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """They have no text, so that the run would have ended after preflight, with nothing to
    measure."""
    (tmp_path / "a").mkdir()
    chats = str(write_rows(tmp_path / "chats.jsonl", build_sum_rows(1, 6)))
    with pytest.raises(InputError, match="stage: cpt is measured on plain text") as refusal:
        inputs.load_inputs(wish(tiny_folder, tmp_path / "a", **{role: chats}))
    assert refusal.value.where == f"{role}: {chats}"


def test_a_step_holds_at_least_a_window(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_tokens 50 is below max_length 60"):
        plan_recipe(wish(tiny_folder, tmp_path, batch_tokens=50))
    with pytest.raises(InputError, match="a window of one token has nothing to predict"):
        plan_recipe(wish(tiny_folder, tmp_path, max_length=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n\n ", "the file has no rows"),
        ("Größe".encode() + "Größe".encode("latin-1"), "not UTF-8"),
        ("a text".encode("utf-16"), "not UTF-8"),
    ],
)
def test_files_that_are_no_text_are_refused(
    content: bytes, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "corpus.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        train(wish(tiny_folder, tmp_path, data=str(file)))


def test_a_mixed_folder_names_the_files_in_another_encoding(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.md").write_text(
            f"# Größe {number}", encoding="latin-1" if number == 4 else "utf-8"
        )
    with pytest.raises(InputError, match=r"1 of 6 rows cannot be used(.|\n)*corpus/4\.md"):
        train(wish(tiny_folder, tmp_path / "a", data=str(folder)))
    steps: list[Event] = train(
        wish(tiny_folder, tmp_path / "b", data=str(folder), skip_invalid=True)
    )
    assert sum(step.supervised_tokens for step in select_steps(steps)) == 5 * len(
        "# Größe 0".encode()
    )
    assert all(event.level != "stop" for event in steps if isinstance(event, CheckResult))


def test_a_line_of_200_mb_is_measured_and_not_read(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    with file.open("wb") as written:
        written.write(b'{"text": "one that is fine"}\n{"text": "')
        written.seek(200 * 2**20, os.SEEK_CUR)  # a hole: no disk is taken
        written.write(b'"}\n')
    tracemalloc.start()
    with pytest.raises(
        InputError,
        match=r"1 too long\n  corpus.jsonl:2: the row has 209,715,\d+ bytes; at most 8 MiB",
    ):
        train(wish(tiny_folder, tmp_path, data=str(file)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20


def folder_of(path: Path, **files: str | bytes) -> Path:
    """`__` is a dot."""
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return path


def test_links_in_a_folder_lead_nowhere_else_and_end(tiny_folder: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "corpus", a__txt="a text that is read once")
    (folder / "up").symlink_to("..")
    (folder / "in").symlink_to(".")
    assert plan_recipe(wish(tiny_folder, tmp_path, data=str(folder))).data["data"].rows == 1
    for target, message in (
        ("b.txt", r"b\.txt: cannot be opened: Too many levels of symbolic links"),
        ("gone.txt", r"b\.txt: broken link: gone\.txt does not exist"),
        ("/etc/hostname", r"b\.txt: a link out of the folder, to /etc/hostname"),
    ):
        (folder / "b.txt").symlink_to(target)
        with pytest.raises(InputError, match=message):
            plan_recipe(wish(tiny_folder, tmp_path, data=str(folder)))
        (folder / "b.txt").unlink()


def test_what_a_folder_holds_beside_texts_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    good = "# A text\n\nwith words in it"
    folder = folder_of(
        tmp_path / "corpus", a__md=good, b__bin=b"\xff\0" * 99, c__jsonl='{"text": "a row"}'
    )
    warned = "\n".join(plan_recipe(wish(tiny_folder, tmp_path, data=str(folder))).warnings)
    assert "only .txt and .md files of corpus are read; skipped: 1 .bin, 1 .jsonl" in warned
    (folder / "c.jsonl").unlink()
    report = plan_recipe(wish(tiny_folder, tmp_path, data=str(folder))).data["data"]
    assert [(f.level, f.count) for f in report.findings if f.check == "unread_files"] == [
        ("info", 1)
    ]
    folder_of(
        tmp_path / "binary",
        a__md=good,
        b__txt=b"\x7fELF" + bytes(99),
        c__txt=b"\x1f\x8b\x08 packed",
    )
    with pytest.raises(InputError, match=r"2 of 3 rows cannot be used(.|\n)*b\.txt(.|\n)*c\.txt"):
        train(wish(tiny_folder, tmp_path, data=str(tmp_path / "binary")))


def test_a_folder_without_texts_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    for files in ({}, {"a__jsonl": '{"text": "a row"}'}):
        with pytest.raises(InputError, match=r"no \.txt or \.md file in this folder"):
            train(
                wish(
                    tiny_folder,
                    tmp_path,
                    data=str(folder_of(tmp_path / f"with{len(files)}", **files)),
                )
            )
    blank = folder_of(tmp_path / "blank", a__txt=" \n", b__md="")
    with pytest.raises(InputError, match="none of the 2 rows can be used"):
        train(wish(tiny_folder, tmp_path, data=str(blank)))
