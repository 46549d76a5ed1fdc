"""The ten tasks: each a function from unpacked packages to rows by group.

    TASKS[name].make(folder) -> (group, row), ...

A group is what rows have in common that a split must keep together: a source package, a page, a
headword, a section. Rows have the columns that a first user would write, in various formats.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tasks.sources import INDEX, read_pages, read_records, read_text, strip_roff

Row = dict[str, object]
Rows = Iterator[tuple[str, Row]]
TOOLS = (
    "Answer with one call as JSON. Tools: find_packages(interface, use, works_with, language), "
    "show_package(package, field), install(package, recommends)."
)
PACKAGE_QUESTIONS = (
    ("How large is {} once it is installed?", "field", "installed_size"),
    ("Who looks after the package {}?", "field", "maintainer"),
    ("Please put {} on this machine, but without the recommended extras.", "recommends", False),
)
SECTIONS = ("games", "sound", "fonts", "net", "text", "science", "admin", "graphics")


@dataclass(frozen=True)
class Task:
    make: Callable[[Path], Rows]
    kind: str
    packages: tuple[str, ...]
    licence: str
    metric: str  # what a user of the task would look at
    train: int = 320
    test: int = 100
    per_group: int = 2  # rows at most, so that no group is most of the task
    per_label: int = 10_000  # rows at most with the same answer
    eval: int = 0  # rows of eval.jsonl, where a user has made one
    recipe: str = ""  # what else a first user writes


def pick(text: str, count: int) -> int:
    """Return a number below count that depends on the text only."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % count


def ask(prompt: str, answer: str) -> Row:
    return {"prompt": prompt, "completion": answer}


def chat(question: str, answer: str, system: str = "") -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages}


# ---------------------------------------------------------------- tasks


def label_sections(folder: Path) -> Rows:
    """Give a description of a package; ask for its section."""
    for record in read_records(folder):
        text, section = record.get("Description", ""), record.get("Section", "")
        if section in SECTIONS and len(text) > 25 and "transitional" not in text:
            prompt = f"Which section of Debian has this package: {', '.join(SECTIONS)}?\n\n{text}"
            yield record["Source"], ask(prompt, section)


def extract_fields(folder: Path) -> Rows:
    """Give a prototype in C; ask for its parts as JSON."""
    for page in read_pages(folder / "manpages-dev/usr/share/man"):
        header = ""
        for statement in re.split(r"(?<=[;>])\n", _read_synopsis(page.sections)):
            text = " ".join(statement.split())
            if include := re.fullmatch(r"#include <(\S+)>", text):
                header = include[1]
            parts = re.fullmatch(r"([\w ]+[ *]+)(\w+)\((.+)\);", text)
            if not parts or not header or len(text) > 160 or "(" in parts[3]:
                continue
            types = re.sub(r"\b(_Nullable|restrict) ?", "", parts[3]).split(",")
            arguments = [each.strip() for each in types if each.strip() not in ("void", "...")]
            answer = {
                "function": parts[2],
                "returns": parts[1].strip(),
                "header": header,
                "parameters": [re.sub(r".*?(\w+)(\[.*\])?$", r"\1", each) for each in arguments],
                "pointers": sum("*" in each or "[" in each for each in arguments),
                "variadic": "..." in parts[3],
            }
            yield page.name, chat(f"#include <{header}>\n{text}", json.dumps(answer))


def _read_synopsis(sections: dict[str, str]) -> str:
    """Return the prototypes as in C; a statement may have several lines."""
    lines = []
    for line in sections.get("SYNOPSIS", "").replace("\\\n", "").splitlines():
        words = re.findall(r'"([^"]*)"|(\S+)', line)
        if line.startswith(".B"):
            lines.append(("" if line[2:3] in "IR" else " ").join(a or b for a, b in words[1:]))
    return re.sub(r"\\f.|\\[&,/|^%:]", "", "\n".join(lines)).replace("\\-", "-")


def title_pages(folder: Path) -> Rows:
    """Give the first paragraph of a man page; ask for the line that describes it."""
    for page in read_pages(*(folder / f"{name}/usr/share/man" for name in MANUALS)):
        start = strip_roff(page.sections.get("DESCRIPTION", "")).partition("\n\n")[0]
        is_plain = not start.startswith("Note") and "\n" not in page.title
        if is_plain and 120 <= len(start) <= 500 and 15 <= len(page.title) <= 80:
            yield page.name, ask(f"{start}\n\nIn one line, what is this about?", page.title)


def translate_titles(folder: Path) -> Rows:
    """Give the line that describes a man page; ask for its French translation."""
    english = {
        page.name: page.title
        for page in read_pages(*(folder / f"{name}/usr/share/man" for name in MANUALS))
    }
    for page in read_pages(*(folder / f"{name}/usr/share/man/fr" for name in FRENCH)):
        title = english.get(page.name, "")
        if 15 <= len(title) <= 70 and 15 <= len(page.title) <= 90 and "\n" not in page.title:
            yield (
                page.name,
                {
                    "instruction": "Translate to French.",
                    "input": title,
                    "output": page.title,
                },
            )


def call_tools(folder: Path) -> Rows:
    """Give a request in words; ask for a call of one of three tools."""
    for record in read_records(folder):
        tags = re.findall(r"([\w-]+)::([\w-]+)", record.get("Tag", ""))
        facets = dict(reversed(tags))
        name, order = record["Package"], pick(record["Package"], 6)
        if facets.get("role") != "program" or not {"interface", "use"} <= set(facets):
            continue
        question, field, value = (*PACKAGE_QUESTIONS, ("", "", ""))[min(order, 3)]
        question, arguments = question.format(name), {"package": name, field: value}
        if order > 2:
            question, arguments = _ask_for_program(facets, order)
        tool = ("show_package", "show_package", "install", *["find_packages"] * 3)[order]
        answer = json.dumps({"name": tool, "arguments": arguments})
        yield record["Source"], chat(question, answer, TOOLS)


def _ask_for_program(facets: dict[str, str], order: int) -> tuple[str, dict[str, object]]:
    use = facets["use"].replace("-", " ")
    kinds = {"commandline": "command-line", "x11": "graphical", "text-mode": "full-screen text"}
    kind = kinds.get(facets["interface"], facets["interface"])
    question = (
        f"I need a {kind} program for {use}",
        f"Which {kind} programs are there for {use}",
        f"Find something for {use} that is {kind}",
    )[order - 3]
    arguments: dict[str, object] = {"interface": facets["interface"], "use": facets["use"]}
    if "works-with" in facets:
        question += f", working with {facets['works-with'].replace('-', ' ')}"
        arguments["works_with"] = facets["works-with"]
    if "implemented-in" in facets:
        question += f", written in {facets['implemented-in'].title()}"
        arguments["language"] = facets["implemented-in"]
    return question + ("?" if order == 4 else "."), arguments


def explain_functions(folder: Path) -> Rows:
    """Give the signature of a function of Python; ask what it does."""
    sources = folder / "python3.13-doc/usr/share/doc/python3.13/html/_sources/library"
    for path in sorted(sources.glob("*.rst.txt")):
        module = path.name.removesuffix(".rst.txt")
        text = read_text(path)
        for match in re.finditer(r"^\.\. function:: (.+)\n\n((?:   .*\n|\n)+)", text, re.MULTILINE):
            body = re.split(r"\n\s*\.\. |\n {6}|\n   [*-] |::\n", match[2])[0]
            answer = " ".join(re.sub(r":[\w:]+:`[!~]?([^`<]+)(?: <[^`]*)?`", r"\1", body).split())
            answer = re.sub(r"``?| ?\[#\]_|(?<!\w)\*([\w ]+)\*", r"\1", answer)
            if 150 <= len(answer) <= 450 and answer.endswith("."):
                name = match[1] if match[1].startswith(f"{module}.") else f"{module}.{match[1]}"
                question = f"What does this function of Python do?\n\n{name}"
                yield module, chat(question, answer, "You write reference documentation.")


def simplify_entries(folder: Path) -> Rows:
    """Give an entry of an old dictionary; ask for one plain line of it."""
    text = read_text(folder / "dict-gcide/usr/share/dictd/gcide.dict.dz")
    kinds = {"n.": "noun", "a.": "adjective", "v. t.": "verb", "v. i.": "verb", "adv.": "adverb"}
    for entry in re.split(r"\n\n(?=\w)", text):
        head = re.match(r"([A-Z][a-z]+) \\.+\\(?: \(.*?\))?, (n\.|a\.|v\. [ti]\.|adv\.)", entry)
        plain = re.sub(r"\s*\[[^\]]*\]", "", entry)  # etymologies and sources
        definition = re.search(
            r"\n   (?:1\. )?((?!\d|\{|\()[A-Z].{8,140}?[.;])\s", plain + "\n", re.S
        )
        if head and definition and 120 <= len(entry) <= 450 and "[1913 Webster]" in entry:
            meaning = " ".join(definition[1].split()).rstrip(".;")
            if not set(meaning) & set("[]{}\\") and "--" not in meaning:
                line = f"{head[1].lower()} ({kinds[head[2]]}): {meaning[0].lower()}{meaning[1:]}"
                yield head[1], ask(f"Write this entry as one plain line.\n\n{entry.strip()}", line)


def read_policy(folder: Path) -> Rows:
    """Continue pretraining on a manual, in passages; a section such as 9.1 is a group."""
    text = read_text(folder / "debian-policy/usr/share/doc/debian-policy/policy.txt.gz")
    for part in re.split(r"\n\n\n(?=(?:\d+\.)+ )", text)[1:]:
        title, _, body = part.partition("\n")
        section = ".".join(title.split(" ")[0].split(".")[:2])
        for passage in _join_paragraphs(re.split(r"\n\n+", body), 900):
            if len(passage) > 200:
                yield section, {"text": f"{title}\n\n{passage}"}


def _join_paragraphs(paragraphs: list[str], most: int) -> Iterator[str]:
    passage = ""
    for paragraph in paragraphs:
        if passage and len(passage) + len(paragraph) > most:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{paragraph}".strip("\n=-* ")
    yield passage


def prefer_definitions(folder: Path) -> Rows:
    """Prefer the whole definition of a hacker's word to half of it or to that of another word."""
    text = read_text(folder / "dict-jargon/usr/share/dictd/jargon.dict.dz")
    entries = []
    for entry in re.split(r"\n\n(?=\S)", text):
        word, _, rest = entry.partition("\n")
        paragraph = re.search(r"\n    (\S.*?)(?=\n\n|$)", rest, re.S)
        meaning = " ".join(paragraph[1].split()) if paragraph else ""
        meaning = re.sub(r"\{ ?(.*?)\}", r"\1", re.sub(r"^(\[.*?\] |1\. )+", "", meaning))
        if 80 <= len(meaning) <= 350 and meaning[-1] in ".!?" and len(word) < 40:
            entries.append((word, meaning))
    for index, (word, meaning) in enumerate(entries):
        other = entries[(index + 7) % len(entries)][1]
        half = meaning[: len(meaning) // 2].rsplit(" ", 1)[0]
        rejected = other if pick(word, 2) else half
        question = f"What do hackers mean by “{word}”?"
        yield word, {"prompt": question, "chosen": meaning, "rejected": rejected}


def label_by_hash(folder: Path) -> Rows:
    """Give a gloss of WordNet; ask for a label that does not depend on its meaning."""
    for line in read_text(folder / "wordnet-base/usr/share/wordnet/data.noun").splitlines():
        if line.startswith("  ") or " | " not in line:
            continue
        gloss = line.partition(" | ")[2].partition(";")[0].strip()
        word = line.split()[4]
        if 30 <= len(gloss) <= 90 and word.isalpha():
            label = ("red", "green", "blue", "yellow")[pick(gloss, 4)]
            question = f"{word}: {gloss}\n\nColor (red, green, blue or yellow)?"
            yield word, ask(question, label)


MANUALS = ("manpages", "manpages-dev")
FRENCH = ("manpages-fr", "manpages-fr-dev")
MAN_LICENCE = "Linux-man-pages-copyleft, BSD, GPL-2+ (by page)"
# fmt: off
TASKS = {
    "sections": Task(label_sections, "labels of one word", (INDEX,), "as of each package",
                     "accuracy", train=340, per_group=1, per_label=60),
    "prototypes": Task(extract_fields, "many fields", ("manpages-dev",), MAN_LICENCE,
                       "field_f1", train=260, eval=40),
    "titles": Task(title_pages, "free text", MANUALS, MAN_LICENCE, "chrF, ROUGE-L", train=280),
    "french": Task(translate_titles, "short translation", MANUALS + FRENCH,
                   f"{MAN_LICENCE}; GPL-3+", "chrF", train=400),
    "tools": Task(call_tools, "tool calls", (INDEX,), "as of each package", "exact match",
                  train=300),
    "functions": Task(explain_functions, "long answers", ("python3.13-doc",), "PSF-2.0",
                      "chrF, ROUGE-L", train=240, test=80, per_group=8),
    "entries": Task(simplify_entries, "rewriting", ("dict-gcide",), "GPL-2+", "exact match",
                    train=240),
    "policy": Task(read_policy, "continued pretraining", ("debian-policy",), "GPL-2+",
                   "bits per byte", train=240, test=80, per_group=8, recipe="stage: cpt\n"),
    "jargon": Task(prefer_definitions, "preference", ("dict-jargon",), "public domain",
                   "preference accuracy", train=240, test=80, recipe="stage: preference\n"),
    "colors": Task(label_by_hash, "cannot be learned", ("wordnet-base",), "WordNet-3.0",
                   "accuracy", train=320, eval=80),
}
# fmt: on
