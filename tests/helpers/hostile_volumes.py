"""Files of allowed size whose content would take many times their size: cases for
hostile_inputs.py.

A list takes 64 bytes of memory for three of the file, a token up to 200 for one of the text, and
a character up to four where one of them needs them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from hostile_rows import NOW, Call, check_rows, make_row
from toy_chat import CHATML, write_model_folder
from tunesmith import api
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.model.hub.validate import check_folder

Parts = Callable[[], Iterator[bytes]]
START = b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"x":['


def write_data(name: str, parts: Parts, folder: Path) -> Call:
    """Check a data file of these bytes."""
    with (folder / name).open("wb") as file:
        file.writelines(parts())
    return partial(api.data_check, model=os.environ["HOSTILE_TINY"], data=str(folder / name))


def repeat_in_row(unit: bytes, times: int) -> Callable[[Path], Call]:
    """A row with a list of this unit in a key that is not used."""
    return partial(write_data, "train.jsonl", lambda: iter((START, unit * times, b"0]}\n")))


def write_text_row(text: str, times: int) -> Callable[[Path], Call]:
    row = partial(make_row, text * times)
    return partial(check_rows, lambda: [row()])


def write_answer(text: Callable[[], str]) -> Callable[[Path], Call]:
    turns = [{"role": "user", "content": "a"}]
    return partial(
        check_rows, lambda: [{"messages": [*turns, {"role": "assistant", "content": text()}]}]
    )


def check_model_file(name: str, parts: Parts, folder: Path) -> Call:
    """Check a model folder that has this file."""
    model = folder / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with (model / name).open("wb") as file:
        file.writelines(parts())
    return partial(check_folder, model, needs_weights=False)


def load_vocabulary(count: int, folder: Path) -> Call:
    """Load a tokenizer of so many tokens."""
    model = write_model_folder(folder / "m", CHATML)
    file = model / "tokenizer.json"
    data: Json = json.loads(file.read_text())
    data["model"]["vocab"] |= {f"token{i}": 1000 + i for i in range(count)}
    file.write_text(json.dumps(data))
    return partial(Renderer.from_folder, model, now=NOW)


def fill_list(unit: bytes, times: int) -> Parts:
    return lambda: iter((b'{"a":[', unit * times, b"0]}"))


def make_call(arguments: str) -> Json:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "a"}, answer]}


CASES: dict[str, Callable[[Path], Call]] = {
    "a row of 2000000 empty lists": repeat_in_row(b"[],", 2_000_000),
    "a row of 60 MB": repeat_in_row(b"[],", 20_000_000),
    "a row of a million objects": repeat_in_row(b'{"a":0},', 1_000_000),
    "a row of 199000 texts": repeat_in_row(b'"ab",', 199_000),
    "a row of 3000000 numbers": repeat_in_row(b"1,", 3_000_000),
    "a text of a million four-byte letters": write_text_row("🤗", 1_000_000),
    "a text of 8 MB with one four-byte letter": write_text_row("a" * 8_000_000 + "🤗", 1),
    "a text of 4 MB with one four-byte letter": write_text_row("a" * 4_000_000 + "🤗", 1),
    "a text of a million words": write_text_row("ab ", 1_000_000),
    "200000 ideographs": write_text_row("日本", 100_000),
    "an answer of 300000 lists": write_answer(lambda: "[" + "[]," * 300_000 + "0]"),
    "arguments of 300000 lists": partial(
        check_rows, lambda: [make_call('{"a":[' + "[]," * 300_000 + "0]}")]
    ),
    "an array with an element of 60 MB": partial(
        write_data, "train.json", lambda: iter((b"[[", b"[]," * 20_000_000, b"0]]"))
    ),
    "an array that is not closed": partial(
        write_data, "train.json", lambda: iter((b"[[", b"[]," * 5_000_000))
    ),
    "a config of a million lists": partial(
        check_model_file, "config.json", fill_list(b"[],", 1_000_000)
    ),
    "a config of 49000 lists": partial(check_model_file, "config.json", fill_list(b"[],", 49_000)),
    "a tokenizer_config of 60 MB": partial(
        check_model_file, "tokenizer_config.json", fill_list(b"[],", 20_000_000)
    ),
    "a special_tokens_map of 140000 lists": partial(
        check_model_file, "special_tokens_map.json", fill_list(b"[],", 140_000)
    ),
    "a vocabulary of 262144 tokens": partial(load_vocabulary, 262_144),
    "a vocabulary of a million tokens": partial(load_vocabulary, 1_000_000),
    "an answer of 4 MB of words": write_answer(lambda: "a word, " * 520_000),
    "an answer of 7.9 MB of words": write_answer(lambda: "a word, " * 980_000),
    "an answer of 4 million equal letters": write_answer(lambda: "o" * 4_000_000),
    "an address of 1.5 million parts": write_text_row("x@" + "a." * 1_500_000, 1),
}
