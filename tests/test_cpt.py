"""Continued pretraining from recipe to record: texts in windows, counted in tokens, measured in bits per byte."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tiny_run import adapter_bytes, measured_files, plan_of, recipe, steps_of, sums, train, until_saved, write_rows
from tunesmith import afterwards, facts, run
from tunesmith.errors import InputError
from tunesmith.recipe import Recipe
from tunesmith.types import Event, Json, Score, Verdict
from tunesmith.verbs import read_record


def texts(first: int, count: int) -> list[Json]:
    return [{"text": f"Text number {n}. " + "It goes on and on. " * (n % 9)} for n in range(first, first + count)]


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
    return recipe(model, folder, **(values | changed))


def held_out(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "eval_data": str(write_rows(folder / "eval.jsonl", texts(40, 6))),
        "test_data": str(write_rows(folder / "test.jsonl", texts(50, 6))),
        "retention_data": measured_files(folder / "other")["retention_data"],
    }


def test_an_epoch_trains_every_token_of_every_text_once(tiny_folder: Path, tmp_path: Path) -> None:
    made = wish(tiny_folder, tmp_path)
    steps = steps_of(train(made))
    rows = texts(1, 30)
    assert sum(step.supervised_tokens for step in steps) == sum(len(row["text"].encode()) for row in rows)
    assert all(140 <= step.tokens <= 260 for step in steps[:-1])
    record = read_record(tmp_path / "run")
    assert record.plan.steps == len(steps) == -(-record.plan.data["data"].tokens // 200)
    assert record.plan["separator"] == "<|text|>"
    assert [verdict.kind for verdict in record.proof][-3:] == ["texts end", "windows cover", "controls"]


def test_texts_are_measured_in_bits_per_byte_before_after_and_on_the_way(tiny_folder: Path, tmp_path: Path) -> None:
    made = wish(tiny_folder, tmp_path, **held_out(tmp_path), num_train_epochs=4, eval_steps=5)
    events = train(made)
    found = {one.task: one for one in read_record(tmp_path / "run").comparisons}
    assert {(task, one.metric) for task, one in found.items()} == {
        ("test", "bits_per_byte"),
        ("general text", "bits_per_byte"),
    }
    assert found["test"].high < 0, "the domain is learnt"
    looks = Counter(one.task for one in events if isinstance(one, Score) and 0 < one.step < len(steps_of(events)))
    assert looks["eval"] == looks["general text"] == (len(steps_of(events)) - 1) // 5
    again = {one.task: one for one in afterwards.evaluate(tmp_path / "run")}
    assert again["test"].after.value == pytest.approx(found["test"].after.value)


def test_a_run_goes_on_to_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    general = {"rehearsal": {"data": str(write_rows(tmp_path / "general.jsonl", texts(90, 20))), "ratio": 0.25}}
    straight, broken = (wish(tiny_folder, tmp_path / name, **general) for name in ("straight", "broken"))
    events = train(straight)
    until_saved(run.train(plan_of(broken)), step=4)
    again = list(run.resume(tmp_path / "broken" / "run"))
    assert [step.loss for step in steps_of(again)] == [step.loss for step in steps_of(events)][4:]
    assert adapter_bytes(broken) == adapter_bytes(straight)


def test_rehearsal_takes_the_place_of_windows(tiny_folder: Path, tmp_path: Path) -> None:
    general = str(write_rows(tmp_path / "general.jsonl", texts(90, 20)))
    made = wish(tiny_folder, tmp_path, rehearsal={"data": general, "ratio": 0.25}, num_train_epochs=3)
    steps = steps_of(train(made))
    plain = plan_of(wish(tiny_folder, tmp_path / "plain", num_train_epochs=3))
    assert len(steps) == plain.steps, "not a step more"
    total = sum(step.tokens for step in steps)
    assert sum(step.task_tokens.get("rehearsal", 0) for step in steps) / total == pytest.approx(0.25, abs=0.03)
    assert total == pytest.approx(200 * len(steps), rel=0.03)


def test_packing_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    one, many = (
        steps_of(train(wish(tiny_folder, tmp_path / str(length), pack_length=length, max_steps=3)))
        for length in (60, 400)
    )
    assert [step.loss for step in one] == pytest.approx([step.loss for step in many], rel=1e-4)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 4}, "batch_size has no effect with stage: cpt, which counts batch_tokens"),
        ({"overlong": "truncate"}, "overlong has no effect with stage: cpt, which cuts long texts into windows"),
        ({"metrics": ["exact_match"]}, "metrics has no effect with stage: cpt"),
        ({"schema": "schema.json"}, "schema has no effect with stage: cpt"),
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
    chats = str(write_rows(tmp_path / "chats.jsonl", sums(1, 6)))
    with pytest.raises(InputError, match="stage: cpt trains plain text, and these are messages rows"):
        facts.gather(wish(tiny_folder, tmp_path / "a", data=chats))
    both = str(write_rows(tmp_path / "both.jsonl", [row | {"body": "as a text"} for row in sums(1, 6)]))
    named = [{"path": both, "format": "text", "columns": {"text": "body"}}]
    assert facts.gather(wish(tiny_folder, tmp_path / "b", data=named)).corpus is not None


def test_a_step_holds_at_least_a_window(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_tokens 50 is below max_length 60"):
        plan_of(wish(tiny_folder, tmp_path, batch_tokens=50))
    with pytest.raises(InputError, match="a window of one token has nothing to predict"):
        plan_of(wish(tiny_folder, tmp_path, max_length=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n\n ", "the file holds no row"),
        ("Größe".encode() + "Größe".encode("latin-1"), "not UTF-8"),
        ("a text".encode("utf-16"), "not UTF-8"),
    ],
)
def test_files_that_are_no_text_are_refused(content: bytes, message: str, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        train(wish(tiny_folder, tmp_path, data=str(file)))


def test_a_mixed_folder_names_the_files_in_another_encoding(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.md").write_text(f"# Größe {number}", encoding="latin-1" if number == 4 else "utf-8")
    with pytest.raises(InputError, match=r"1 of 6 rows cannot be used(.|\n)*corpus/4\.md"):
        train(wish(tiny_folder, tmp_path / "a", data=str(folder)))
    steps: list[Event] = train(wish(tiny_folder, tmp_path / "b", data=str(folder), skip_bad=True))
    assert sum(step.supervised_tokens for step in steps_of(steps)) == 5 * len("# Größe 0".encode())
    assert all(event.level != "stop" for event in steps if isinstance(event, Verdict))
