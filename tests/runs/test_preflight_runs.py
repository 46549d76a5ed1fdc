"""The preflight of every stage, on rows that leave checks with nothing, and on mixed lengths."""

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import make_chat_row, make_tiny_recipe, write_rows
from tunesmith import api
from tunesmith.core.events import CheckResult
from tunesmith.core.run_dir import read_run_record
from tunesmith.core.types import Json
from tunesmith.recipe.schema import Stages
from tunesmith.session import session
from tunesmith.session.inputs import load_inputs
from tunesmith.session.planner import make_plan
from tunesmith.session.session import open_session
from tunesmith.train.preflight import run_preflight
from tunesmith.train.stages import load_stage_inputs, make_staged_plan

pytestmark = pytest.mark.promise


def write_texts(path: Path, lengths: list[int]) -> str:
    """Texts of one token per byte, and EOS."""
    rows = [{"text": f"{number} " + "word " * 200} for number in range(len(lengths))]
    for row, length in zip(rows, lengths, strict=True):
        row["text"] = row["text"][: length - 1]
    return str(write_rows(path, rows))


def check_rows(model: Path, folder: Path, **changed: Any) -> dict[str, CheckResult]:
    """Plan, open and check a run; every result that is ok has compared something."""
    recipe = make_tiny_recipe(model, folder, **changed)
    run_inputs = load_inputs(recipe)
    opened = open_session(make_plan(run_inputs), run_inputs)
    results = {result.kind: result for result in run_preflight(opened.model, opened.samples)}
    assert_nothing_is_empty(tuple(results.values()))
    return results


def assert_nothing_is_empty(results: tuple[CheckResult, ...]) -> None:
    for result in results:
        assert isinstance(result.num_checked, int), result
        assert (result.level == "ok") == (result.num_checked > 0 and "not " not in result.evidence)


CPT: dict[str, Any] = {"stage": "cpt", "batch_size": "auto", "batch_tokens": 300, "max_length": 100}


def test_texts_over_the_length_are_checked_as_windows(tiny_folder: Path, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "texts.jsonl", [300, 150, 420])
    results = check_rows(tiny_folder, tmp_path, data=data, **CPT)
    assert results["EOS between documents"].evidence.startswith("3 texts end")
    covered = results["every token is a target once"]
    assert covered.num_checked == 299 + 149 + 419
    assert covered.evidence == "867 tokens of 3 texts in 11 windows"
    assert "lost target" in results["negative controls"].evidence


def test_a_text_in_windows_is_checked_behind_many_short_ones(
    tiny_folder: Path, tmp_path: Path
) -> None:
    data = write_texts(tmp_path / "texts.jsonl", [50] * 210 + [250] + [60] * 9)
    results = check_rows(tiny_folder, tmp_path, data=data, **CPT)
    assert results["EOS between documents"].num_checked == session.STOCK_ID_ROWS + 1
    assert results["every token is a target once"].num_checked == 20 * 49 + 249


@pytest.mark.parametrize(
    ("max_piece", "max_bytes", "num_texts"), [(100, 10**6, 3), (100, 500, 2), (100, 50, 0)]
)
def test_long_texts_are_checked_unless_all_are_too_long(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_piece: int,
    max_bytes: int,
    num_texts: int,
) -> None:
    monkeypatch.setattr(session, "MAX_PIECE_CHARS", max_piece)
    monkeypatch.setattr(session, "MAX_CHECKED_BYTES", max_bytes)
    data = write_texts(tmp_path / "texts.jsonl", [700, 300, 200])
    results = check_rows(tiny_folder, tmp_path, data=data, **CPT)
    assert results["EOS between documents"].num_checked == num_texts
    assert (results["negative controls"].level == "ok") == (num_texts > 0)
    if not num_texts:
        assert results["negative controls"].evidence.endswith(
            "not injected: lost target (there is no text)"
        )


def test_plain_text_has_no_ids_to_compare(tiny_folder: Path, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "texts.jsonl", [40, 50, 60])
    results = check_rows(tiny_folder, tmp_path, data=data)
    assert results["token ids match apply_chat_template"].level == "warn"
    assert results["EOS is supervised"].level == "ok"


def test_rows_that_share_nothing_leave_prefix_sharing_unchecked(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "", "completion": letter} for letter in "abcdef"]
    data = str(write_rows(tmp_path / "short.jsonl", rows))
    results = check_rows(
        tiny_folder, tmp_path, data=data, share_prefixes=True, chat_template="none"
    )
    assert results["prefix-shared loss = unshared loss"].level == "warn"
    skipped = results["negative controls"].evidence.partition("not injected: ")[2]
    assert skipped.startswith(
        "cache that loses a token (every document has one token), another end"
    )
    assert "branch that attends to its sibling" in skipped


def test_constraints(tiny_folder: Path, tmp_path: Path) -> None:
    """Every answer is a banned one, so that no document is complete."""
    rows = [make_chat_row(f"say {n}", f"As an AI {n}") | {"negative": True} for n in range(8)]
    data = str(write_rows(tmp_path / "bad.jsonl", rows))
    never = [{"name": "ai", "match": "As an AI", "mode": "ban"}]
    results = check_rows(tiny_folder, tmp_path, data=data, never=never)
    assert results["EOS is supervised"].level == "warn"
    assert "trained away from" in results["EOS is supervised"].evidence
    good = [make_chat_row("what?", "this"), make_chat_row("who?", "that")]
    data = str(write_rows(tmp_path / "mixed.jsonl", [*rows, *good]))
    results = check_rows(tiny_folder, tmp_path, data=data, never=never)
    assert results["EOS is supervised"].num_checked == len(good)


def test_preference(tiny_folder: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{n} and {n}", "chosen": f"{2 * n}", "rejected": "no"} for n in range(6)]
    data = str(write_rows(tmp_path / "pairs.jsonl", pairs))
    results = check_rows(tiny_folder, tmp_path, data=data, stage="preference")
    assert results["prefix-shared loss = unshared loss"].level == "ok"
    text_pairs = [{"prompt": "", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(6)]
    data = str(write_rows(tmp_path / "texts.jsonl", text_pairs))
    check_rows(tiny_folder, tmp_path / "texts", data=data, stage="preference")


def test_a_long_rehearsal_document_is_packed_with_the_shortest(
    tiny_folder: Path, tmp_path: Path
) -> None:
    general = write_texts(tmp_path / "general.jsonl", [30] * 5 + [400] + [20] * 5)
    rehearsal = {"data": general, "ratio": 0.2}
    results = check_rows(tiny_folder, tmp_path, rehearsal=rehearsal)
    plain = check_rows(tiny_folder, tmp_path / "plain")

    def find_longest(checks: dict[str, CheckResult]) -> int:
        return int(checks["packed loss = unpacked loss"].evidence.rpartition(", ")[2])

    assert find_longest(results) > 3 * find_longest(plain)
    cpt = CPT | {"max_length": 60}
    texts = write_texts(tmp_path / "texts.jsonl", [50, 40, 30] * 9)
    results = check_rows(tiny_folder, tmp_path / "cpt", data=texts, rehearsal=rehearsal, **cpt)
    assert find_longest(results) > 50


def test_stages(tiny_folder: Path, tmp_path: Path) -> None:
    """Each stage has its own preflight, and the record of all holds both."""
    cpt = {"data": write_texts(tmp_path / "texts.jsonl", [300, 420, 250, 380]), "max_length": 100}
    sft = {"data": write_texts(tmp_path / "plain.jsonl", [40, 50, 60, 30])}
    recipe = api.read_recipe(
        {
            "model": str(tiny_folder),
            "output_dir": str(tmp_path / "run"),
            "dtype": "fp32",
            "attention": "sdpa",
            "num_train_epochs": 1,
            "stage": [{"cpt": cpt}, {"sft": sft}],
        }
    )
    assert isinstance(recipe, Stages)
    run_inputs = load_stage_inputs(recipe)
    list(api.train(make_staged_plan(run_inputs), run_inputs))
    preflight = read_run_record(tmp_path / "run").preflight
    assert_nothing_is_empty(preflight)
    kinds = [result.kind for result in preflight]
    assert kinds.count("negative controls") == 2
    by_kind = {result.kind: result for result in preflight}
    assert by_kind["every token is a target once"].level == "ok"
    assert by_kind["token ids match apply_chat_template"].level == "warn"


# ---------------------------------------------------------------- length-dependent rotation

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 1.5 * i for i in range(8)],
    "original_max_position_embeddings": 120,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "context"), [(LONGROPE, 512), (DYNAMIC, 256)], ids=["longrope", "dynamic"]
)
def test_the_shortest_row_is_packed_with_the_longest_wherever_they_stand(
    tiny_folder: Path, tmp_path: Path, rope: Json, context: int
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"rope_parameters": rope, "max_position_embeddings": context}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [make_chat_row(f"question {n}", "an answer") for n in range(240)]
    rows[215] = make_chat_row("long", "word " * 40)
    rows[220] = make_chat_row("a", "b")
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    results = check_rows(folder, tmp_path, data=data)
    lengths = results["packed loss = unpacked loss"].evidence.rpartition("lengths ")[2].split(", ")
    assert int(lengths[0]) < 40 < 200 < int(lengths[-1])
    assert results["rotation per document"].level == "ok"
    assert "pack rotated as one document" in results["negative controls"].evidence
