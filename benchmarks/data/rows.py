"""Make the benchmark's rows: code of Python's standard library, with the docstring as the answer.

    standard library -> chat rows (code in, docstring out) -> the files that both sides read

The text is real and is on every machine. A version of Python gives the same rows everywhere; their
hash is in the results. Rows have 200 to 700 tokens, answers 20 to 90.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.core.types import Document, Example, Json, Row
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.formats.parse import parse_pair, parse_row

SYSTEM = "Write the docstring of this Python code. Answer with the text alone, without quotes."
SKIPPED_PACKAGES = {
    *("test", "tests", "idle_test", "site-packages", "idlelib", "lib2to3", "turtledemo"),
    "ensurepip",
}
CODE_CHARS = range(300, 2800)
ANSWER_CHARS = range(70, 400)
ROW_TOKENS = range(200, 701)
ANSWER_TOKENS = range(20, 91)
PAIR_CODE_CHARS = range(2000, 6000)
PAIR_TOKENS = range(600, 1201)


def iter_docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (code without its docstring, docstring) of each class and function in a file."""
    try:
        text = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):  # the library has invalid files for its own tests
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        docstring = ast.get_docstring(node)
        if docstring and len(node.body) > 1:
            first, *rest = node.body
            header = lines[node.lineno - 1 : first.lineno - 1]
            body = lines[first.end_lineno : rest[-1].end_lineno]
            yield textwrap.dedent("\n".join(header + body)), shorten_docstring(docstring)


def shorten_docstring(docstring: str) -> str:
    """Return the first paragraphs, up to at least 120 characters."""
    text = ""
    for paragraph in docstring.split("\n\n"):
        text = f"{text}\n\n{paragraph}" if text else paragraph
        if len(text) >= 120:
            break
    return text.strip()


def load_code_answers(code_chars: range) -> list[tuple[str, str]]:
    """Return (code, docstring) in the order of a hash, without repeated code or answers."""
    library = Path(sysconfig.get_path("stdlib"))
    codes: dict[str, str] = {}  # answer -> code
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_PACKAGES & set(path.relative_to(library).parts):
            continue
        for code, answer in iter_docstrings(path):
            if len(code) in code_chars and len(answer) in ANSWER_CHARS:
                codes[answer] = code
    answers = {code: answer for answer, code in codes.items()}
    shuffled = sorted(answers, key=lambda code: hashlib.sha256(code.encode()).hexdigest())
    return [(code, answers[code]) for code in shuffled]


def make_messages(system: str, code: str, answer: str) -> list[Json]:
    turns = {"system": system, "user": code, "assistant": answer}
    return [{"role": role, "content": content} for role, content in turns.items()]


def make_example(row: Json, number: int) -> Example:
    return parse_row(Row(f"rows:{number}", row), "messages", True)


def select_rows(
    renderer: Renderer, count: int, *, system: str = SYSTEM, row_tokens: range = ROW_TOKENS
) -> tuple[list[Json], list[Document]]:
    """Return the first `count` rows {"messages": ...} of the right length, and their documents."""
    rows: list[Json] = []
    documents: list[Document] = []
    for number, (code, answer) in enumerate(load_code_answers(CODE_CHARS), start=1):
        row = {"messages": make_messages(system, code, answer)}
        (document,) = renderer.render(make_example(row, number)).documents
        if len(document) in row_tokens and int((document.weights_L > 0).sum()) in ANSWER_TOKENS:
            rows.append(row)
            documents.append(document)
        if len(rows) == count:
            return rows, documents
    raise SystemExit(f"too few rows of the right length in this Python: {len(rows)} of {count}")


def make_pairs(renderer: Renderer, count: int) -> list[Document]:
    """Return both sides of preference pairs.

    The prompt is long code, chosen is its docstring, rejected the docstring of other code.
    """
    documents: list[Document] = []
    code_answers = load_code_answers(PAIR_CODE_CHARS)
    neighbours = itertools.pairwise(code_answers)
    for number, ((code, answer), (_, other)) in enumerate(neighbours, start=1):
        *prompt, chosen = make_messages(SYSTEM, code, answer)
        row = {"prompt": prompt, "chosen": [chosen], "rejected": [{**chosen, "content": other}]}
        pair = parse_pair(Row(f"pairs:{number}", row), "preference", True)
        sides = renderer.render(pair).documents
        if all(len(side) in PAIR_TOKENS for side in sides):
            documents += sides
        if len(documents) == 2 * count:
            return documents
    num_pairs = len(documents) // 2
    raise SystemExit(f"too few pairs of the right length in this Python: {num_pairs} of {count}")


def write_rows(path: Path, rows: Sequence[Json]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def group_by_length(documents: Sequence[Document], batch_size: int) -> list[Document]:
    """Return the documents in batches of similar lengths, with batches of all lengths mixed.

    This is the best that length grouping can do, and fair to a run that is cut off.
    """
    ordered = sorted(documents, key=len)
    starts = range(0, len(ordered) - batch_size + 1, batch_size)
    golden_ratio = (5**0.5 - 1) / 2
    spread = sorted(range(len(starts)), key=lambda i: i * golden_ratio % 1)
    grouped: list[Document] = []
    for i in spread:
        grouped += ordered[starts[i] : starts[i] + batch_size]
    return grouped
