"""Build the rows of the demo: Debian changelog entries, and JSON with their facts.

In: `usr/share/doc/<package>/{changelog.Debian.gz,copyright}` of the packages in demo_packages.txt
(one a source), under --root: a Debian 13 machine with these packages installed or unpacked. Out:
train.jsonl, eval.jsonl, test.jsonl and NOTICES.txt. Run once by a developer; the same packages give
the same bytes. Left out: the general text (build_demo_general.py), and ORIGIN.md, written by hand.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

# Licences of the packaging that are accepted.
LICENCES = {
    "0bsd", "apache-2.0", "apache-2-llvm-exceptions", "bsd-2", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause or gpl-2+", "bsl-1.0", "cc0-1.0", "expat", "isc", "mit", "mit or apache-2.0",
    "mit/x", "mit/x11", "psf", "public-domain", "x11", "zlib",
}  # fmt: skip

SYSTEM = (
    "Read the Debian changelog entry and answer with one line of JSON: package, upstream (version "
    "without epoch and Debian revision), revision (Debian revision or null), date (YYYY-MM-DD), "
    "new_upstream (true or false), upload (maintainer, team or nmu), closes (closed bug numbers, "
    "ascending)."
)

ROWS = {"test": 80, "eval": 60, "train": 260}
ROWS_PER_SOURCE = 5
CHARACTERS = range(150, 461)  # of an entry
SIMILAR = 0.6  # Jaccard of word triples from which two entries count as the same

HEADER = re.compile(r"(\S+) \(([^)]+)\) [^;]+; urgency=\w+$")
TRAILER = re.compile(r"^ -- (.+?)  ?(\w{3}, .+)$", re.MULTILINE)
EMAIL = re.compile(r"[ \t]*<[^<>\s]+@[^<>\s]+>|\b[\w.+-]+@[\w-]+\.[\w.-]+\b")
CLOSES = re.compile(r"closes:\s*(?:bug)?#?\s?\d+(?:,\s*(?:bug)?#?\s?\d+)*", re.IGNORECASE)
UNCLEAR = re.compile(r"closes? #|binary-only|\bQA (?:group )?upload", re.IGNORECASE)
UPLOAD = re.compile(r"non-maintainer upload|\bNMU\b|team upload", re.IGNORECASE)
UPLOAD_ITEM = re.compile(
    r"^\s+\* (non-maintainer upload|NMU|team upload)", re.IGNORECASE | re.MULTILINE
)
NEW_UPSTREAM = re.compile(
    r"new (?:\w+ )?(?:upstream|major|minor|bugfix|patch)|upstream (?:release|version)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Source:
    """A source package with its licence and its changelog entries, newest first."""

    name: str
    package: str
    version: str
    licence: str
    copyright: str
    licence_text: str
    entries: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    source: Source
    entry: str
    answer: dict[str, object]


def parse_stanzas(text: str) -> list[dict[str, str]]:
    """Return the stanzas of a control file; values keep line breaks, without the indent."""
    stanzas: list[dict[str, str]] = []
    for stanza in re.split(r"\n\s*\n", text):
        fields = re.findall(r"^([A-Za-z-]+):((?:.*\n?)(?:[ \t].*\n?)*)", stanza, re.MULTILINE)
        stanzas.append(
            {
                key: re.sub(r"^[ \t]+\.?(?=\n)|^[ \t]+", "", value.strip(), flags=re.MULTILINE)
                for key, value in fields
            }
        )
    return stanzas


def read_packaging_licence(text: str) -> tuple[str, str, str]:
    """Return (short name, copyright, licence text) of debian/changelog in a copyright file.

    For a choice of two licences the text is that of the first.
    """
    stanzas = parse_stanzas(text)
    texts = [s["License"].partition("\n") for s in stanzas if "Files" not in s and "License" in s]
    for pattern in ("debian/changelog", "debian/*", "*"):
        for stanza in stanzas:
            if pattern in stanza.get("Files", "").split() and "License" in stanza:
                name, _, body = stanza["License"].partition("\n")
                first = name.lower().split(" or ")[0]
                body = body or next(
                    (body for short, _, body in texts if body and short.lower() == first), ""
                )
                return name, EMAIL.sub("", stanza.get("Copyright", "")), body
    raise SystemExit("no machine-readable licence")


def read_source(root: Path, package: str) -> Source:
    folder = root / "usr/share/doc" / package
    native = folder / "changelog.gz"
    debian = folder / "changelog.Debian.gz"
    text = gzip.decompress((debian if debian.exists() else native).read_bytes()).decode(
        "utf-8", "replace"
    )
    entries = tuple(
        e.strip("\n") for e in re.findall(r"^\S.*?^ -- .*?$", text, re.MULTILINE | re.DOTALL)
    )
    head = HEADER.match(entries[0].partition("\n")[0]) or re.match(r"(\S+) \(([^)]+)\)", entries[0])
    if head is None:
        raise SystemExit(f"{package}: no changelog header")
    licence, holders, body = read_packaging_licence((folder / "copyright").read_text("utf-8"))
    if licence.lower() not in LICENCES:
        raise SystemExit(f"{package}: licence {licence} is not on the list")
    if not body:
        raise SystemExit(f"{package}: no text of {licence}")
    return Source(head[1], package, head[2], licence, holders, body, entries)


def split_version(version: str) -> tuple[str, str | None]:
    """Split 1:2.1.5-4 into 2.1.5 and 4; the revision of a native version is None."""
    upstream, dash, revision = (
        version.partition(":")[2].rpartition("-") if ":" in version else version.rpartition("-")
    )
    return (upstream, revision) if dash else (revision, None)


def extract_answer(entry: str, previous: str) -> dict[str, object] | None:
    """Return the facts of an entry, or None if they are ambiguous or contradictory."""
    head, before = HEADER.match(entry.partition("\n")[0]), re.match(r"\S+ \(([^)]+)\)", previous)
    trailer = TRAILER.search(entry)
    if head is None or before is None or trailer is None or UNCLEAR.search(entry):
        return None
    mentions, items = UPLOAD.findall(entry), UPLOAD_ITEM.findall(entry)
    if len(mentions) > 1 or mentions != items:
        return None
    upload = "maintainer" if not items else "team" if items[0].lower().startswith("team") else "nmu"
    upstream, revision = split_version(head[2])
    new_upstream = upstream != split_version(before[1])[0]
    if revision is not None and new_upstream != bool(NEW_UPSTREAM.search(entry)):
        return None
    return {
        "package": head[1],
        "upstream": upstream,
        "revision": revision,
        "date": parsedate_to_datetime(trailer[2]).date().isoformat(),
        "new_upstream": new_upstream and revision is not None,
        "upload": upload,
        "closes": sorted(
            {int(n) for match in CLOSES.findall(entry) for n in re.findall(r"\d+", match)}
        ),
    }


def make_word_triples(entry: str) -> frozenset[str]:
    """Word triples of the items, numbers masked: what near-duplicates have in common."""
    words = re.findall(
        r"[a-z]+|0", re.sub(r"\d+", "0", "\n".join(entry.splitlines()[1:-1]).lower())
    )
    return frozenset(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


def hash_text(text: str) -> str:
    """A shuffle that stays the same for ever."""
    return hashlib.sha256(text.encode()).hexdigest()


def get_family(name: str) -> str:
    """Sources that are packaged alike stay in one split: plexus-cipher and plexus-utils2 are both
    `plexus`."""
    return re.sub(r"[\d.]+.*$", "", re.sub(r"^(lib|python-)", "", name)).split("-")[0]


def select_records(sources: list[Source]) -> list[Record]:
    """Return at most ROWS_PER_SOURCE entries per source without near duplicates.

    Entries that close bugs come first.
    """
    records: list[Record] = []
    seen: list[frozenset[str]] = []
    for source in sorted(sources, key=lambda s: hash_text(s.name)):
        pairs = [
            (EMAIL.sub("", e), extract_answer(e, p))
            for e, p in zip(source.entries, source.entries[1:], strict=False)
        ]
        usable = [(e, a) for e, a in pairs if a and len(e) in CHARACTERS]
        num_taken = 0
        for entry, answer in sorted(
            usable, key=lambda pair: (not pair[1]["closes"], hash_text(pair[0]))
        ):
            words = make_word_triples(entry)
            if num_taken < ROWS_PER_SOURCE and all(
                len(words & other) < SIMILAR * len(words | other) for other in seen
            ):
                records.append(Record(source, entry, answer))
                seen.append(words)
                num_taken += 1
    return records


def split_records(rows: list[Record]) -> dict[str, list[Record]]:
    """Assign families of packages to test until it is full, then to eval, then to train."""
    families: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        families[get_family(row.source.name)].append(row)
    splits: dict[str, list[Record]] = {name: [] for name in ROWS}
    for name in sorted(families, key=lambda f: hash_text("split " + f)):
        target = next((split for split, size in ROWS.items() if len(splits[split]) < size), None)
        if target:
            splits[target] += families[name]
    return {
        s: sorted(part, key=lambda row: hash_text(row.entry))[: ROWS[s]]
        for s, part in splits.items()
    }


def format_row(row: Record) -> str:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": row.entry},
        {
            "role": "assistant",
            "content": json.dumps(row.answer, separators=(",", ":"), ensure_ascii=False),
        },
    ]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def format_notices(rows: list[Record]) -> str:
    """Return the copyright holders of the entries, then each licence text once.

    A changelog may contain entries under earlier package names.
    """
    texts: dict[str, list[Source]] = defaultdict(list)
    names: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        names[row.source.name].add(str(row.answer["package"]))
    lines = [
        "Copyright of the changelog entries, by source package, as its debian/copyright states.",
        "",
    ]
    for source in sorted(
        {row.source.name: row.source for row in rows}.values(), key=lambda s: s.name
    ):
        holders = "; ".join(line.strip() for line in source.copyright.splitlines() if line.strip())
        lines += [f"{source.name} {source.version} (package {source.package}): {source.licence}"]
        lines += [f"  entries of {', '.join(sorted(names[source.name]))}", f"  {holders}"]
        texts[source.licence_text].append(source)
    for text in sorted(texts):
        under = ", ".join(source.name for source in texts[text])
        lines += ["", "-" * 100, f"{texts[text][0].licence}: {under}", "", text]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("/"))
    parser.add_argument("--out", type=Path, default=Path("src/tunesmith/recipe/demo"))
    options = parser.parse_args()
    packages = Path(__file__).with_name("demo_packages.txt").read_text("utf-8").split()
    splits = split_records(
        select_records([read_source(options.root, package) for package in packages])
    )
    for split, rows in splits.items():
        text = "".join(format_row(row) for row in rows)
        (options.out / f"{split}.jsonl").write_text(text, "utf-8")
        print(
            split,
            len(rows),
            "rows",
            len({row.source.name for row in rows}),
            "sources",
            hash_text(text),
        )
    (options.out / "NOTICES.txt").write_text(
        format_notices([row for rows in splits.values() for row in rows]), "utf-8"
    )


if __name__ == "__main__":
    main()
