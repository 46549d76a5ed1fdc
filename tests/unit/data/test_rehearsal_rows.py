"""Which rehearsal rows go with which step: the share of tokens, the purity of the choice, the
pieces of long texts."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from tiny_runs import build_sum_rows, make_chat_row, write_rows
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.dataset import Dataset, open_dataset
from tunesmith.data.golden_set import refuse_rehearsal_leakage
from tunesmith.data.rehearsal import RehearsalSampler
from tunesmith.recipe.fields import DataSource

NOW = datetime(2026, 1, 1)


@pytest.fixture(scope="module")
def renderer(tiny_folder: Path) -> Renderer:
    return Renderer.from_folder(tiny_folder, now=NOW)


def texts(count: int) -> list[Json]:
    return [{"text": f"text number {n} " + "and so on " * (n * 7 % 5)} for n in range(count)]


def opened(renderer: Renderer, path: Path, rows: list[Json]) -> Dataset:
    return open_dataset([DataSource(path=write_rows(path, rows))], renderer)


def rehearsal(rows: Dataset, **changed: object) -> RehearsalSampler:
    tokens = sum(len(document) for i in range(len(rows)) for document in rows.render_documents(i))
    values = {
        "total_tokens": tokens,
        "max_tokens": 1000,
        "step_tokens": 300.0,
        "ratio": 0.1,
        "seed": 0,
    }
    return RehearsalSampler.from_dataset(rows, **(values | changed))  # type: ignore[arg-type]


def ids(sampler: RehearsalSampler, step: int, *changes: tuple[int, float]) -> list[str]:
    return [document.id for document in sampler.read_documents(step, changes)]


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_the_ratio_is_of_tokens_and_holds_at_every_step(
    renderer: Renderer, tmp_path: Path, ratio: float
) -> None:
    rows = opened(renderer, tmp_path / "texts.jsonl", texts(40))
    sampler = rehearsal(rows, ratio=ratio)
    longest = max(len(document) for i in range(len(rows)) for document in rows.render_documents(i))
    took = 0
    for step in range(1, 60):
        took += sum(len(document) for document in sampler.read_documents(step))
        due = step * 300 * ratio / (1 - ratio)
        assert abs(took - due) <= 0.5 * longest + 0.05 * due, step


def test_a_pass_takes_every_row_once_in_its_own_order(renderer: Renderer, tmp_path: Path) -> None:
    rows = opened(renderer, tmp_path / "texts.jsonl", texts(9))
    sampler = rehearsal(rows, ratio=0.5)
    taken = [name for step in range(1, 40) for name in ids(sampler, step)]
    passes = [tuple(taken[i : i + 9]) for i in range(0, 36, 9)]
    assert all(sorted(sampler) == sorted(rows.get_id(i) for i in range(9)) for sampler in passes)
    assert len(set(passes)) == len(passes)
    other = rehearsal(rows, ratio=0.5, seed=1)
    assert taken != [name for step in range(1, 40) for name in ids(other, step)]


def test_a_changed_ratio_holds_from_the_next_step_on(renderer: Renderer, tmp_path: Path) -> None:
    sampler = rehearsal(opened(renderer, tmp_path / "texts.jsonl", texts(40)), ratio=0.1)
    more, none = [(10, 0.5)], [(10, 0.0)]
    assert [ids(sampler, step, *more) for step in range(1, 11)] == [
        ids(sampler, step) for step in range(1, 11)
    ]
    assert not any(ids(sampler, step, *none) for step in range(11, 30))
    counts = [
        sum(len(ids(sampler, step, *change)) for step in range(11, 21)) for change in ((), more)
    ]
    assert 5 < counts[1] / counts[0] < 13, "1 to 1 instead of 1 to 9"


def test_rehearsal_documents_are_named_and_whole_answers_are_kept(
    renderer: Renderer, tmp_path: Path
) -> None:
    rows = opened(
        renderer,
        tmp_path / "chats.jsonl",
        [*build_sum_rows(1, 8), make_chat_row("long", "answer " * 300)],
    )
    sampler = rehearsal(rows, ratio=0.5, max_tokens=200)
    documents = [document for step in range(1, 30) for document in sampler.read_documents(step)]
    assert {document.task for document in documents} == {"rehearsal"}
    assert max(len(document) for document in documents) <= 200
    assert {document.id for document in documents} == {f"chats.jsonl:{n}" for n in range(1, 9)}
    assert all(not document.weights_L[:20].any() for document in documents), "answers only"


def test_a_long_text_gives_one_window_a_pass_and_all_of_them_in_turn(
    renderer: Renderer, tmp_path: Path
) -> None:
    rows = opened(
        renderer,
        tmp_path / "texts.jsonl",
        [{"text": "".join(map(str, range(50)))}, {"text": "another text"}],
    )
    sampler = rehearsal(rows, ratio=0.5, max_tokens=31)
    documents = [document for step in range(1, 7) for document in sampler.read_documents(step)]
    parts = {tuple(d.tokens_L[1:].tolist()) for d in documents if d.id == "texts.jsonl:1"}
    assert sorted(token for part in parts for token in part) == sorted(
        rows.render_documents(0)[0].tokens_L[1:].tolist()
    )


def test_rows_that_are_measured_are_refused_by_their_ids(
    renderer: Renderer, tmp_path: Path
) -> None:
    rows = opened(renderer, tmp_path / "texts.jsonl", texts(9))
    held_out = opened(
        renderer,
        tmp_path / "test.jsonl",
        [{"text": "other"}, {"text": f"  {texts(9)[4]['text']}\n"}],
    )
    refuse_rehearsal_leakage(rows, {"eval_data": held_out.select_rows(np.array([0]))})
    with pytest.raises(
        InputError, match=r"1 of 9 rows is also in test_data: texts.jsonl:5 is test.jsonl:2\n"
    ):
        refuse_rehearsal_leakage(rows, {"test_data": held_out})
    with pytest.raises(InputError, match=r"rehearsal: .*2 of 2 rows"):
        refuse_rehearsal_leakage(held_out, {"retention_data": held_out})
