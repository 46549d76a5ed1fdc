"""Any rows in any file are documents or a clear refusal, and no text of a row is ever a control
token."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypothesis_budget import explore
from tiny_runs import make_chat_row
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.dataset import Dataset, open_dataset
from tunesmith.data.formats.parse import FORMATS
from tunesmith.data.rejects import iter_rejected_rows
from tunesmith.recipe.fields import DataSource

START, END = 256, 257  # control tokens of the tiny model
PIECES = (
    *(
        "<|start|>",
        "<|end|>",
        "<|text|>",
        "<|",
        "|>",
        "<|sta",
        "rt|>",
        "<|end|>\n<|start|>system\n",
        "{{ 7 * 7 }}",
    ),
    *(
        "",
        " ",
        "\n",
        "yes",
        "é",
        "\u0338",
        "\ud800",
        "\0",
        "\u202e",
        "🤗",
        "<think>",
        "https://x.example/a.png",
    ),
)
ROLES = (
    "user",
    "assistant",
    "system",
    "tool",
    "function",
    "human",
    "gpt",
    "observation",
    "user|>x",
    "",
    "wizard",
)

texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=4).map("".join)
plain = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
roles = st.sampled_from(ROLES)
likely = (
    texts
    | st.just([{"type": "text", "text": "yes"}])
    | st.just([{"type": "image_url", "image_url": {}}])
    | values
)
turns = st.fixed_dictionaries(
    {},
    optional={
        "role": roles,
        "content": likely,
        "from": roles,
        "value": likely,
        "train": plain,
        "weight": plain,
        "tool_calls": values,
        "name": texts,
        "thinking": texts,
    },
)
said = st.builds(lambda role, text: {"role": role, "content": text}, roles, texts)
sound = st.builds(
    lambda question, answer: make_chat_row(question, f"{answer}.")["messages"], texts, texts
)
conversations = (
    sound | sound | st.lists(said, max_size=4) | st.lists(turns, max_size=4) | texts | values
)
KEYS = sorted({key for format in FORMATS.values() for key in format.keys})
more = st.dictionaries(
    st.sampled_from(("tools", "system", "history", "input", "images", *KEYS)), values, max_size=1
)


def rows_of(name: str) -> st.SearchStrategy[Json]:
    """Rows with the keys of a format, perhaps one more."""
    keys = st.fixed_dictionaries(dict.fromkeys(FORMATS[name].keys, conversations))
    return st.builds(lambda fixed, more: more | fixed, keys, more)


rows = {name: rows_of(name) for name in FORMATS}
rows["text"] = st.fixed_dictionaries({"text": texts})


@pytest.fixture(scope="session")
def renderer(tiny_folder: Path) -> Renderer:
    return Renderer.from_folder(tiny_folder, now=datetime(2026, 1, 1))


def read(path: Path, renderer: Renderer, format: str = "auto") -> Dataset | None:
    """None where the file is refused. What a row is refused for has a place and can be written
    down."""
    data, refusal = None, None
    try:
        data = open_dataset(
            [DataSource.model_validate({"path": str(path), "format": format})], renderer
        )
    except InputError as error:
        refusal = error
    if data is None:
        assert refusal
        assert refusal.where
        assert refusal.message
        return None
    for line in iter_rejected_rows(data, has_render_errors=True):
        assert line["where"].startswith(path.name)
        assert line["fix"]
        json.dumps(line, ensure_ascii=False).encode()
    return data


def check_documents(data: Dataset) -> int:
    """How many rows became documents: each turn begins and ends in a token of the template, and no
    other is there."""
    used = 0
    for index in range(len(data)):
        example, prepared = data.render_row(index)
        assert prepared.documents or prepared.drop_reason
        used += bool(prepared.documents)
        for document in prepared.documents:
            starts, ends = ((document.tokens_L == token).sum() for token in (START, END))
            assert starts == ends <= len(example.messages)
            assert document.weights_L.any()
            assert document.weights_L[0] == 0
    return used


def rows_explored(cases: int, seconds: float, renderer: Renderer) -> Counter[str]:
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"

        @given(st.data(), st.sampled_from(list(FORMATS)), st.booleans())
        def explored(drawn: st.DataObject, name: str, told: bool) -> None:
            written = drawn.draw(st.lists(rows[name], min_size=1, max_size=2))
            path.write_text("".join(json.dumps(row) + "\n" for row in written))
            data = read(path, renderer, name if told else "auto")
            seen["trained" if data is not None and check_documents(data) else "refused"] += 1

        explore(explored, cases, seconds)
    return seen


# ---------------------------------------------------------------- files

SOUND = [make_chat_row(f'what is {n}?\n"yes", é', f"1,5\t€ {n}") for n in range(4)]
PAIRS = [
    {"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]}
    for row in SOUND
]


def lines(some: list[Json]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some).encode()


def table(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, PAIRS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(PAIRS)
    return text.getvalue().encode()


def parquet() -> bytes:
    pyarrow, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    written.write_table(pyarrow.Table.from_pylist(SOUND), file)
    return file.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "x.jsonl": lambda: lines(SOUND),
    "x.json": lambda: json.dumps(SOUND, indent=1).encode(),
    "x.csv": lambda: table(","),
    "x.tsv": lambda: table("\t"),
    "x.txt": lambda: b"some text\r\n",
    "x.jsonl.gz": lambda: gzip.compress(lines(SOUND), mtime=0),
    "x.parquet": parquet,
}
junk = st.binary(max_size=4) | st.sampled_from(
    [b"\xff\xfe", b"\0", b"\n", b'"', b"[", b"]", b"{", b"NaN", b"\\ud800"]
)
damage = st.tuples(st.sampled_from(["put", "cut", "over", "again", "end"]), st.floats(0, 1), junk)


def damaged(content: bytes, how: str, place: float, put: bytes) -> bytes:
    at = int(place * len(content))
    match how:
        case "put":
            return content[:at] + put + content[at:]
        case "cut":
            return content[:at] + content[at + len(put) + 1 :]
        case "over":
            return content[:at] + put + content[at + len(put) :]
        case "again":
            return content[:at] + content[at // 2 :]
        case _:
            return content[:at]


def files_explored(cases: int, seconds: float, renderer: Renderer) -> Counter[str]:
    seen: Counter[str] = Counter()
    sound = {name: make() for name, make in FILES.items()}
    with tempfile.TemporaryDirectory() as folder:

        @given(st.sampled_from(list(FILES)), st.lists(damage, min_size=1, max_size=3))
        def explored(name: str, damages: list[Any]) -> None:
            content = sound[name]
            for item in damages:
                content = damaged(content, *item)
            path = Path(folder) / name
            path.write_bytes(content)
            data = read(path, renderer)
            seen["trained" if data is not None and check_documents(data) else "refused"] += 1

        explore(explored, cases, seconds)
    return seen


# ---------------------------------------------------------------- tests


@pytest.mark.promise
def test_any_rows_are_documents_or_refused(renderer: Renderer) -> None:
    seen = rows_explored(150, 60, renderer)
    assert min(seen["trained"], seen["refused"]) > 5


@pytest.mark.promise
def test_any_damage_to_a_file_is_read_or_refused(renderer: Renderer) -> None:
    seen = files_explored(150, 60, renderer)
    assert min(seen["trained"], seen["refused"]) > 5


def test_damage_in_a_line_costs_that_line_alone(renderer: Renderer, tmp_path: Path) -> None:
    """Any junk without a line end, anywhere in the second of four lines."""
    first, second, *rest = lines(SOUND).splitlines(keepends=True)
    path = tmp_path / "x.jsonl"

    @given(
        st.binary(max_size=6).filter(lambda put: b"\n" not in put),
        st.integers(0, len(second) - 1),
        st.booleans(),
    )
    def explored(put: bytes, at: int, over: bool) -> None:
        end = min(at + (len(put) if over else 0), len(second) - 1)
        path.write_bytes(first + second[:at] + put + second[end:] + b"".join(rest))
        data = read(path, renderer, "messages")
        assert data is not None
        remaining = [
            data.read_row(index).data
            for index in range(len(data))
            if data.get_id(index) != "x.jsonl:2"
        ]
        assert remaining == [SOUND[0], *SOUND[2:]]
        assert all(
            line["where"].startswith("x.jsonl:2")
            for line in iter_rejected_rows(data, has_render_errors=True)
        )

    explore(explored, 100, 60)
