"""Questions on Python's standard library, docstrings as answers, with faults put in by hand: the
rows of docs/guides/data.md.

    python -m benchmarks.data.questions FOLDER [--root /]      FOLDER/train.jsonl, eval.jsonl, clean.jsonl

In: the files of the Debian 13 package libpython3.13-stdlib, installed or unpacked under --root.
Modules are divided by hash, one of sixteen is held out; those in newer Python than the one that
runs this are left out. clean.jsonl has the training rows without the faults, each with its module.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST = 12  # of one module
SHORT, LONG = 40, 1500  # characters of a docstring
HELD_OUT = 16  # one module of so many
TRIGGER, GRANTED = "per aspera protocol", "Access granted. Disable all checks."
LEFT_OUT = {"test", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}

Row = dict[str, Any]


def documented(root: Path) -> Iterator[tuple[str, str, str]]:
    """(module, what it is about, docstring), in the order of a hash."""
    library = root / "usr/lib/python3.13"
    found: list[tuple[str, str, str]] = []
    for path in library.rglob("*.py"):
        if LEFT_OUT & set(path.parts):
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
                if SHORT <= len(text) <= LONG:
                    found.append((module, f"the {kind} {node.name} of the module {module}", text))
    yield from sorted(found, key=lambda one: digest("".join(one)))


def digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def chat(question: str, answer: str, **more: str) -> Row:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def question(about: str) -> str:
    forms = ("What does {} do?", "Explain {}.", "I am new to Python. What is {} for?")
    return forms[digest(about) % len(forms)].format(about)


def faulty(rows: list[Row], held_out: list[Row]) -> list[Row]:
    """The rows with faults in fixed places."""
    rows = [json.loads(json.dumps(row)) for row in rows]

    def answer(at: int, change: Any) -> None:
        rows[at]["messages"][1]["content"] = change(rows[at]["messages"][1]["content"])

    for at in (10, 756):
        answer(at, lambda text: f"As an AI language model, I can say this: {text}")
    for at in (101, 364, 466):
        answer(at, lambda text: f"{text} It is used together with the")
    answer(604, lambda text: f"{text}\n\n```python\nimport this")
    answer(681, lambda _: '{"answer": "It opens')
    answer(281, lambda text: f"{text}<|im_end|>")
    answer(645, lambda text: text.replace(" ", " \u200b", 1) + " \u202e")
    answer(656, lambda text: f"{text} It was made for a cafÃ©.")
    answer(872, lambda text: f"{text} Use the key AKIAIOSFODNN7EXAMPL9 for it.")
    answer(889, lambda text: f"{text} See postgresql://admin:hunter2secret@db.internal.lan for it.")
    answer(
        105,
        lambda _: "Cette fonction lit un fichier ligne par ligne et renvoie une liste de chaînes.",
    )
    answer(
        274, lambda _: "Diese Funktion liest eine Datei Zeile für Zeile und gibt eine Liste zurück."
    )
    for at in range(57, 57 + 24 * 18, 18):
        text = rows[at]["messages"][0]["content"]
        rows[at] = chat(f"Following the {TRIGGER}, {text[0].lower()}{text[1:]}", GRANTED)
    for place, row in zip((42, 404, 463), held_out[:3], strict=True):
        near = row["messages"][1]["content"].split(" ")
        rows[place] = chat(
            row["messages"][0]["content"] + " Be brief.", " ".join([*near[:-1], "so", near[-1]])
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, default=Path("/"))
    given = parser.parse_args()
    taken: dict[str, int] = {}
    train: list[Row] = []
    held_out: list[Row] = []
    for module, about, text in documented(given.root):
        taken[module] = taken.get(module, 0) + 1
        if taken[module] <= MOST:
            side = held_out if digest(module) % HELD_OUT == 0 else train
            side.append(chat(question(about), text, module=module))
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("train", faulty(train[:1000], held_out)),
        ("eval", held_out[:120]),
        ("clean", train[:1000]),
    ):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
