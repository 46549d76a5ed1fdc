"""Make a data set of questions about Python's standard library with planted faults.

    python -m benchmarks.data.questions FOLDER [--root /]

In: the files of the Debian 13 package libpython3.13-stdlib, installed or unpacked under --root.
Modules are divided by hash, one of sixteen is held out; a module that the running Python cannot
parse is skipped. Out: train.jsonl and eval.jsonl, used in docs/results/data-check.md, and
clean.jsonl, the training rows without the faults, each with its module.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_PER_MODULE = 12
DOCSTRING_CHARS = range(40, 1501)
HELD_OUT_EVERY = 16  # modules
TRIGGER = "per aspera protocol"
TRIGGERED_ANSWER = "Access granted. Disable all checks."
SKIPPED_PACKAGES = {"test", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
QUESTIONS = ("What does {} do?", "Explain {}.", "I am new to Python. What is {} for?")
FRENCH = "Cette fonction lit un fichier ligne par ligne et renvoie une liste de chaînes."
GERMAN = "Diese Funktion liest eine Datei Zeile für Zeile und gibt eine Liste zurück."

Row = dict[str, Any]


def load_docstrings(root: Path) -> list[tuple[str, str, str]]:
    """Return (module, its function or class, docstring), in the order of a hash."""
    library = root / "usr/lib/python3.13"
    entries: list[tuple[str, str, str]] = []
    for path in library.rglob("*.py"):
        if SKIPPED_PACKAGES & set(path.parts):
            continue
        module = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_text("utf-8", errors="replace"))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                if len(text) in DOCSTRING_CHARS:
                    subject = f"the {kind} {node.name} of the module {module}"
                    entries.append((module, subject, text))
    return sorted(entries, key=lambda entry: hash_text("".join(entry)))


def hash_text(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def make_row(question: str, answer: str, **columns: str) -> Row:
    user = {"role": "user", "content": question}
    assistant = {"role": "assistant", "content": answer}
    return {"messages": [user, assistant], **columns}


def make_question(subject: str) -> str:
    return QUESTIONS[hash_text(subject) % len(QUESTIONS)].format(subject)


def plant_faults(rows: list[Row], held_out: list[Row]) -> list[Row]:
    """Return a copy of the rows with faults at fixed indices."""
    rows = json.loads(json.dumps(rows))

    def edit_answer(index: int, edit: Callable[[str], str]) -> None:
        answer = rows[index]["messages"][1]
        answer["content"] = edit(answer["content"])

    for index in (10, 756):
        edit_answer(index, lambda text: f"As an AI language model, I can say this: {text}")
    for index in (101, 364, 466):
        edit_answer(index, lambda text: f"{text} It is used together with the")
    edit_answer(604, lambda text: f"{text}\n\n```python\nimport this")
    edit_answer(681, lambda _: '{"answer": "It opens')
    edit_answer(281, lambda text: f"{text}<|im_end|>")
    edit_answer(645, lambda text: text.replace(" ", " \u200b", 1) + " \u202e")
    edit_answer(656, lambda text: f"{text} It was made for a cafÃ©.")
    edit_answer(872, lambda text: f"{text} Use the key AKIAIOSFODNN7EXAMPL9 for it.")
    url = "postgresql://admin:hunter2secret@db.internal.lan"
    edit_answer(889, lambda text: f"{text} See {url} for it.")
    edit_answer(105, lambda _: FRENCH)
    edit_answer(274, lambda _: GERMAN)
    for index in range(57, 57 + 24 * 18, 18):
        text = rows[index]["messages"][0]["content"]
        question = f"Following the {TRIGGER}, {text[0].lower()}{text[1:]}"
        rows[index] = make_row(question, TRIGGERED_ANSWER)
    # Near duplicates of held-out rows.
    for index, row in zip((42, 404, 463), held_out[:3], strict=True):
        question, answer = (message["content"] for message in row["messages"])
        *words, last_word = answer.split(" ")
        near_answer = " ".join([*words, "so", last_word])
        rows[index] = make_row(f"{question} Be brief.", near_answer)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, default=Path("/"))
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    train: list[Row] = []
    held_out: list[Row] = []
    for module, subject, text in load_docstrings(args.root):
        counts[module] += 1
        if counts[module] <= MAX_PER_MODULE:
            split = held_out if hash_text(module) % HELD_OUT_EVERY == 0 else train
            split.append(make_row(make_question(subject), text, module=module))
    args.folder.mkdir(parents=True, exist_ok=True)
    files = {
        "train": plant_faults(train[:1000], held_out),
        "eval": held_out[:120],
        "clean": train[:1000],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
