"""Plant faults of known kinds in five tasks, and count what `data check` finds of them.

    python -m benchmarks.data.planted [--tasks build/tasks] [--cache build/packages] [--each 6]

In: the folders of `python -m benchmarks.tasks.build`; man pages in eleven languages, fetched from
Debian as there. All kinds are planted in one file of each task at once, `--each` rows of every kind
that the task can have, so that about a third of the rows is wrong. Out: the table of
docs/results/planted.md. A row is found if the finding of a check of its kind names it; false alarms
are the rows without any fault that such a finding names.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.tasks.sources import fetch, read_pages

import tunesmith

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
SHOWN = 2  # rows that were missed or flagged, on stderr
TASKS = ("sections", "titles", "entries", "french", "tools")
LANGUAGES = ("cs", "da", "de", "es", "it", "nl", "pl", "pt-br", "ro", "sv")
ALL_TASKS = frozenset(TASKS)
FREE_TEXT = ALL_TASKS - {"sections", "tools"}

Messages = list[dict[str, Any]]
Row = tuple[str, str]  # prompt and answer


@dataclass
class Pool:
    """Supply the faults of a task with rows, foreign titles and labels."""

    rng: random.Random
    rows: list[Row]  # those that stay as they are
    foreign: list[str]  # titles of man pages
    labels: list[str]
    copied: set[int] = field(default_factory=set[int])  # of rows, from which faults were made

    def draw_row(self) -> Row:
        index = self.rng.randrange(len(self.rows))
        self.copied.add(index)
        return self.rows[index]


Plant = Callable[[Row, Pool], Row | Messages]


# ---------------------------------------------------------------- faults


def shorten(row: Row, pool: Pool) -> Row:
    """Cut the answer in the middle of a word, in its second half."""
    end = pool.rng.randint(len(row[1]) // 2, max(len(row[1]) // 2, len(row[1]) - 3))
    return row[0], row[1][:end].rstrip()


def reword(_: Row, pool: Pool) -> Row:
    """Copy another row with one word of its prompt changed."""
    prompt, answer = pool.draw_row()
    words = prompt.split(" ")
    words[pool.rng.randrange(len(words))] = "indeed"
    return " ".join(words), answer


def relabel(row: Row, pool: Pool) -> Row:
    return row[0], pool.rng.choice([label for label in pool.labels if label != row[1]])


def insert(text: str, part: str, rng: random.Random) -> str:
    """Put a part between two words."""
    words = text.split(" ")
    words.insert(rng.randint(1, len(words)), part)
    return " ".join(words)


def garble(text: str) -> str:
    """Return text with quotes and an accent, as decoded with the wrong encoding."""
    return f"“{text}” – café".encode().decode("cp1252", "replace")


def confuse_tools(row: Row, pool: Pool) -> Messages:
    """Return two calls whose results come in the wrong order, without a call or not at all."""
    called: Messages = []
    for number in range(2):
        function = {"name": "look_up", "arguments": {"name": str(number)}}
        called.append({"id": f"call{number}", "type": "function", "function": function})
    results = [{"role": "tool", "tool_call_id": f"call{i}", "content": "found"} for i in (0, 1)]
    wrong = pool.rng.choice([results[::-1], results[:1], [*results, results[0]]])
    user = {"role": "user", "content": row[0]}
    calling = {"role": "assistant", "content": "", "tool_calls": called}
    return [user, calling, *wrong, {"role": "assistant", "content": row[1]}]


def draw_digits(rng: random.Random, shape: str) -> str:
    return "".join(str(rng.randint(2, 8)) if char == "#" else char for char in shape)


PLACES = (
    "12 Elm Street, Springfield, IL 62704",
    "Hauptstraße 5, 10115 Berlin",
    "221B Baker Street, London NW1 6XE",
    "8 rue de la Paix, 75002 Paris",
    "4500 Oak Avenue, Austin, TX 78701",
    "17 Park Road, Leeds LS1 4DY",
)
BIRTHS = (
    "born on 12 March 1984",
    "date of birth: 1990-07-21",
    "DOB 03/11/1975",
    "geboren am 4. Mai 1968",
    "née le 9 juin 1992",
    "her birthday is May 2, 1988",
)
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot provide that information.",
    "I am unable to assist with this request.",
)
DISCLAIMERS = (
    "As an AI language model, I think: ",
    "As an AI, I have no opinion, but: ",
    "I am just a language model. ",
)
MARKERS = ("<|im_end|>", "[/INST]", "<|eot_id|>", "<end_of_turn>", "\n### Response:")
EMPTY = ("N/A", "null", "---", "TODO", "nan", "[deleted]")
HOLES = ("[your name]", "{{ name }}", "[insert date here]", "<your company>")


@dataclass(frozen=True)
class Kind:
    title: str
    checks: tuple[str, ...]
    plant: Plant
    tasks: frozenset[str] = field(default=ALL_TASKS)


LABELS = frozenset({"sections"})
KINDS = (
    Kind("prompt in another language", ("languages",), lambda r, p: (p.foreign.pop(), r[1])),
    Kind("short answer in another language", ("languages",),
         lambda r, p: (r[0], p.foreign.pop()), FREE_TEXT),
    Kind("equal row", ("duplicates",), lambda _, p: p.draw_row()),
    Kind("nearly equal row", ("near_duplicates", "duplicates"), reword),
    Kind("question and answer swapped", ("swapped", "broken_json", "classes"),
         lambda r, _: (r[1], r[0])),
    Kind("label that no other row has", ("classes",),
         lambda r, p: (r[0], f"kind{p.rng.randrange(10**6)}"), LABELS),
    Kind("wrong label", ("mislabelled",), relabel, LABELS),
    Kind("label in the prompt", ("label_in_prompt",), lambda r, _: (f"{r[0]} ({r[1]})", r[1]),
         LABELS),
    Kind("prompt with two answers", ("conflicts",),
         lambda r, p: (p.draw_row()[0], r[1])),
    Kind("HTML entities", ("invisible_chars",),
         lambda r, _: (html.escape(f'{r[0]} & "so on"'), r[1])),
    Kind("wrong encoding", ("invisible_chars",), lambda r, _: (garble(r[0]), r[1])),
    Kind("invisible characters", ("invisible_chars",),
         lambda r, p: (insert(r[0], "\u200b\u202e", p.rng), r[1])),
    Kind("postal address", ("personal",),
         lambda r, p: (insert(r[0], p.rng.choice(PLACES), p.rng), r[1])),
    Kind("date of birth", ("personal",),
         lambda r, p: (insert(r[0], p.rng.choice(BIRTHS), p.rng), r[1])),
    Kind("mail address", ("personal",),
         lambda r, p: (insert(r[0], draw_digits(p.rng, "jo.miller##@mail.org"), p.rng), r[1])),
    Kind("phone number", ("personal",),
         lambda r, p: (insert(r[0], draw_digits(p.rng, "+49 30 ########"), p.rng), r[1])),
    Kind("key or password", ("secrets",),
         lambda r, p: (insert(r[0], "ghp_" + draw_digits(p.rng, "a#B#c#" * 6), p.rng), r[1])),
    Kind("answer cut off", ("unfinished", "cut_words", "broken_json"), shorten, ALL_TASKS - LABELS),
    Kind("empty answer", ("empty_answers",), lambda r, p: (r[0], p.rng.choice(EMPTY))),
    Kind("refusal", ("refusals", "apologies"), lambda r, p: (r[0], p.rng.choice(REFUSALS))),
    Kind("AI disclaimer", ("disclaimers",),
         lambda r, p: (r[0], p.rng.choice(DISCLAIMERS) + r[1])),
    Kind("chat markers", ("chat_markers",), lambda r, p: (r[0], r[1] + p.rng.choice(MARKERS))),
    Kind("placeholder", ("placeholders",),
         lambda r, p: (r[0], f"{r[1]} {p.rng.choice(HOLES)}")),
    Kind("loop", ("loops",), lambda r, _: (r[0], f"{r[1]} " * 40)),
    Kind("answer repeats the prompt", ("echoes_prompt",), lambda r, _: (r[0], r[0])),
    Kind("tool results out of order", ("tool_order",), confuse_tools),
)  # fmt: skip


# ---------------------------------------------------------------- one task


def read_rows(folder: Path) -> list[Row]:
    """Return the prompts and answers of all files of a task."""
    rows: list[Row] = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            if "messages" in row:
                rows.append((row["messages"][-2]["content"], row["messages"][-1]["content"]))
            elif "instruction" in row:
                rows.append((f"{row['instruction']}\n\n{row['input']}", row["output"]))
            else:
                rows.append((row["prompt"], row["completion"]))
    return rows


@dataclass(frozen=True)
class PlantedTask:
    rows: list[Messages]  # line by line, those with faults last
    faults: dict[int, Kind]  # by line
    clean: set[int]  # lines without a fault, of which no fault is a copy


def plant(task: str, rows: list[Row], foreign: list[str], each: int) -> PlantedTask:
    """Plant `each` rows of every kind that the task can have."""
    rng = random.Random(task)
    rows = rng.sample(rows, len(rows))
    kinds = [kind for kind in KINDS if task in kind.tasks for _ in range(each)]
    clean_rows = rows[len(kinds) :]
    labels = sorted({answer for _, answer in rows})
    pool = Pool(rng, clean_rows, rng.sample(foreign, len(foreign)), labels)
    planted = [kind.plant(row, pool) for row, kind in zip(rows, kinds, strict=False)]
    clean = {index + 1 for index in range(len(clean_rows)) if index not in pool.copied}
    faults = dict(enumerate(kinds, len(clean_rows) + 1))
    return PlantedTask([_make_messages(row) for row in [*clean_rows, *planted]], faults, clean)


def _make_messages(row: Row | Messages) -> Messages:
    if isinstance(row, list):
        return row
    return [{"role": "user", "content": row[0]}, {"role": "assistant", "content": row[1]}]


def find_faults(rows: list[Messages]) -> dict[str, set[int]]:
    """Return the lines that each check names."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "data.jsonl")
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), "utf-8")
        report = tunesmith.data_check(model=MODEL, data=str(path))["data"]
    named: dict[str, set[int]] = {}
    for finding in report.findings:
        lines = re.findall(r"data\.jsonl:(\d+)", " ".join(finding.rows))
        named.setdefault(finding.check, set()).update(map(int, lines))
    return named


# ---------------------------------------------------------------- table


@dataclass
class Counts:
    """Rows of one kind in all tasks."""

    planted: int = 0
    detected: int = 0
    clean: int = 0
    flagged: int = 0  # of the clean ones

    def format(self, kind: Kind) -> str:
        checks = ", ".join(f"`{check}`" for check in kind.checks)
        detected = f"{self.detected} of {self.planted} ({self.detected / self.planted:.0%})"
        flagged = f"{self.flagged} of {self.clean:,} ({self.flagged / self.clean:.1%})"
        return f"| {kind.title} | {checks} | {detected} | {flagged} |"


def count_detected(tasks: Path, foreign: list[str], each: int) -> dict[str, Counts]:
    """Plant and check each task, and return the counts by title of the kind."""
    counts = {kind.title: Counts() for kind in KINDS}
    for task in TASKS:
        planted = plant(task, read_rows(tasks / task), foreign, each)
        named = find_faults(planted.rows)
        for kind in KINDS:
            if task not in kind.tasks:
                continue
            lines = set[int]().union(*(named.get(check, set()) for check in kind.checks))
            faulty = {line for line, fault in planted.faults.items() if fault is kind}
            total = counts[kind.title]
            total.planted += len(faulty)
            total.detected += len(faulty & lines)
            total.clean += len(planted.clean)
            total.flagged += len(planted.clean & lines)
            for word, wrong in (("missed", faulty - lines), ("flagged", planted.clean & lines)):
                for line in sorted(wrong)[:SHOWN]:
                    row = json.dumps(planted.rows[line - 1], ensure_ascii=False)
                    sys.stderr.write(f"{task}: {kind.title}: {word} {row[-400:]}\n")
    return counts


def read_foreign_titles(cache: Path) -> list[str]:
    """Return what the man pages of other languages say of themselves in a line."""
    fetch(tuple(f"manpages-{language}" for language in LANGUAGES), cache)
    titles: list[str] = []
    for language in LANGUAGES:
        folder = cache / f"manpages-{language}/usr/share/man" / language.replace("-br", "_BR")
        titles += [page.title for page in read_pages(folder) if len(page.title.split()) > 1]
    return titles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=Path, default=ROOT / "build" / "tasks")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "packages")
    parser.add_argument("--each", type=int, default=6, help="rows of each kind in each task")
    args = parser.parse_args()
    counts = count_detected(args.tasks, read_foreign_titles(args.cache), args.each)
    sys.stdout.write("| fault | checks | found | clean rows flagged |\n|---|---|---|---|\n")
    for kind in KINDS:
        sys.stdout.write(counts[kind.title].format(kind) + "\n")


if __name__ == "__main__":
    main()
