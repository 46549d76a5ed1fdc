"""The rows of the benchmark: code of Python's standard library, and the docstring that was taken
out of it.

    standard library -> chat rows (code in, docstring out) -> the files that both sides read

Real text, found on every machine, not stored here. One version of Python gives the same rows
everywhere; their hash stands in the results. Rows have 200 to 700 tokens, answers 20 to 90."""

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
SKIP = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
}
CODE_CHARACTERS, ANSWER_CHARACTERS = range(300, 2800), range(70, 400)
ROW_TOKENS, ANSWER_TOKENS = range(200, 701), range(20, 91)
LONG_CHARACTERS, LONG_TOKENS = range(2000, 6000), range(600, 1201)  # of pairs


def documented(path: Path) -> Iterator[tuple[str, str]]:
    """(code without its docstring, docstring) of each class and function of a file."""
    try:
        text = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):  # some files of the library are there to be wrong
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and len(node.body) > 1
        ):
            docstring = ast.get_docstring(node)
            if docstring:
                first, rest = node.body[0], node.body[1:]
                code = (
                    lines[node.lineno - 1 : first.lineno - 1]
                    + lines[first.end_lineno : rest[-1].end_lineno]
                )
                yield textwrap.dedent("\n".join(code)), opening(docstring)


def opening(docstring: str) -> str:
    """The first paragraphs of a docstring, as many as make a sentence or two."""
    taken = ""
    for paragraph in docstring.split("\n\n"):
        taken = f"{taken}\n\n{paragraph}" if taken else paragraph
        if len(taken) >= 120:
            break
    return taken.strip()


def code_and_answers(characters: range) -> list[tuple[str, str]]:
    """Code of so many characters and its docstring, in an order that stays, no code and no answer
    twice."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in library.rglob("*.py") if not SKIP & set(path.relative_to(library).parts)
    )
    pairs = {
        answer: code
        for path in files
        for code, answer in documented(path)
        if len(code) in characters and len(answer) in ANSWER_CHARACTERS
    }
    unique = {code: answer for answer, code in pairs.items()}
    shuffled = sorted(unique, key=lambda code: hashlib.sha256(code.encode()).hexdigest())
    return [(code, unique[code]) for code in shuffled]


def messages(system: str, code: str, answer: str) -> list[Json]:
    turns = {"system": system, "user": code, "assistant": answer}
    return [{"role": role, "content": content} for role, content in turns.items()]


def example(row: Json, number: int) -> Example:
    return parse_row(Row(f"rows:{number}", row), "messages", True)


def fitting(
    renderer: Renderer, count: int, *, system: str = SYSTEM, row_tokens: range = ROW_TOKENS
) -> tuple[list[Json], list[Document]]:
    """The first `count` rows {"messages": ...} of the right length, and their documents."""
    rows: list[Json] = []
    documents: list[Document] = []
    for number, (code, answer) in enumerate(code_and_answers(CODE_CHARACTERS), start=1):
        row = {"messages": messages(system, code, answer)}
        (document,) = renderer.render(example(row, number)).documents
        if len(document) in row_tokens and int((document.weights_L > 0).sum()) in ANSWER_TOKENS:
            rows.append(row)
            documents.append(document)
        if len(rows) == count:
            return rows, documents
    raise SystemExit(
        f"this Python's library gives only {len(rows)} rows of the right length, {count} are needed"
    )


def pairs(renderer: Renderer, count: int) -> list[Document]:
    """Both sides of pairs: a long piece of code, its docstring, and the docstring of something
    else."""
    found: list[Document] = []
    taken = code_and_answers(LONG_CHARACTERS)
    for number, ((code, answer), (_, other)) in enumerate(itertools.pairwise(taken), start=1):
        *prompt, chosen = messages(SYSTEM, code, answer)
        row = {"prompt": prompt, "chosen": [chosen], "rejected": [{**chosen, "content": other}]}
        sides = renderer.render(
            parse_pair(Row(f"pairs:{number}", row), "preference", True)
        ).documents
        if all(len(side) in LONG_TOKENS for side in sides):
            found += sides
        if len(found) == 2 * count:
            return found
    raise SystemExit(
        f"this Python's library gives only {len(found) // 2} pairs of the right length"
    )


def write_rows(path: Path, rows: Sequence[Json]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def by_length(documents: Sequence[Document], batch: int) -> list[Document]:
    """Batches of equal lengths, in an order in which every stretch of batches has all lengths: what
    length grouping can do at best, and fair to a run that is cut off."""
    ordered = sorted(documents, key=len)
    starts = range(0, len(ordered) - batch + 1, batch)
    golden = (5**0.5 - 1) / 2
    spread = sorted(range(len(starts)), key=lambda i: i * golden % 1)
    return [document for i in spread for document in ordered[starts[i] : starts[i] + batch]]
