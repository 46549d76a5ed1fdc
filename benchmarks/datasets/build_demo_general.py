"""Build the general text of the demo, on which forgetting is measured.

In: files of the Debian 13 packages r-cran-janeaustenr, dict-jargon and libpython3.13-stdlib,
installed or unpacked under --root. Out: general.jsonl, rows {"text", "domain"}, PASSAGES from
each of four domains, and the licence of the Python texts. Run once by a developer; the same
packages give the same bytes. Left out: ORIGIN.md, written by hand.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import re
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path

PASSAGES = 20  # per domain
CHARACTERS = range(600, 1201)
R_STRING = re.compile(
    rb"\x00\x04\x00[\x09\x0a](....)", re.DOTALL
)  # the type of a string, then its length


def fiction(root: Path) -> Iterator[str]:
    """Yield paragraphs of Jane Austen's novels (zlib blocks of strings, one per line)."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:
        block = zlib.decompressobj()
        raw, data = block.decompress(data[4:]), block.unused_data
        lines: list[str] = []
        end = 0
        while match := R_STRING.search(raw, end):
            end = match.end() + int.from_bytes(match[1], "big")
            lines.append(raw[match.end() : end].decode())
        yield from re.split(r"\n{2,}", "\n".join(lines))


def dictionary(root: Path) -> Iterator[str]:
    """Yield entries of the Jargon File."""
    text = gzip.decompress((root / "usr/share/dictd/jargon.dict.dz").read_bytes()).decode()
    for entry in re.split(r"\n\n(?=\S)", text.split("\nabbrev\n", 1)[-1]):
        head, _, body = entry.partition("\n\n")
        yield f"{head}\n\n{textwrap.dedent(body).rstrip()}"


def reference(root: Path) -> Iterator[str]:
    """Yield sections of the Python language reference from pydoc."""
    tree = ast.parse((root / "usr/lib/python3.13/pydoc_data/topics.py").read_text("utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    for topic in ast.literal_eval(table).values():
        paragraphs = topic.strip().split("\n\n")
        for start in range(0, len(paragraphs), 6):
            yield "\n\n".join(paragraphs[start : start + 6])


def code(root: Path) -> Iterator[str]:
    """Yield functions and small classes of the standard library.

    Modules with a separate copyright are skipped.
    """
    for path in sorted((root / "usr/lib/python3.13").glob("*.py")):
        source = path.read_text("utf-8")
        if "opyright" not in source:
            yield from (
                part for part in re.split(r"\n{3,}", source) if re.match(r"(def|class|@\w)", part)
            )


DOMAINS = {"fiction": fiction, "dictionary": dictionary, "reference": reference, "code": code}


def select_passages(passages: Iterator[str]) -> list[str]:
    """Return PASSAGES texts of the right length in hash order, without shared paragraphs."""
    selected: list[str] = []
    seen: set[str] = set()
    fitting = {text for text in passages if len(text) in CHARACTERS}
    for text in sorted(fitting, key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
        paragraphs = {paragraph for paragraph in text.split("\n\n") if len(paragraph) > 80}
        if len(selected) < PASSAGES and not paragraphs & seen:
            selected.append(text)
            seen |= paragraphs
    return selected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("/"))
    parser.add_argument("--out", type=Path, default=Path("src/tunesmith/recipe/demo"))
    options = parser.parse_args()
    rows = [
        {"text": text, "domain": d}
        for d, read in DOMAINS.items()
        for text in select_passages(read(options.root))
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (options.out / "general.jsonl").write_text(text, "utf-8")
    licence = (options.root / "usr/lib/python3.13/LICENSE.txt").read_text("utf-8")
    terms = licence[
        licence.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2") : licence.index(
            "BEOPEN.COM LICENSE"
        )
    ]
    (options.out / "PSF-LICENSE.txt").write_text(terms.rstrip() + "\n", "utf-8")
    print(len(rows), "passages", hashlib.sha256(text.encode()).hexdigest())


if __name__ == "__main__":
    main()
