"""What the tasks are made of: packages of Debian, fetched by its client, never stored here.

    fetch(names, folder)      unpack packages, each into a folder of its name
    read_records(folder)      the index of all packages
    read_page(path) -> Page   a man page: its name, its line of description, its sections

Packages are fetched once; the same versions give the same bytes.
"""

from __future__ import annotations

import gzip
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

INDEX = "index"  # a file, made as if it were a package
FONTS = {"B", "I", "BI", "BR", "IB", "IR", "RB", "RI", "SM", "SB"}
BREAKS = {"P", "PP", "LP", "TP", "IP", "br", "sp"}


def fetch(names: tuple[str, ...], folder: Path) -> None:
    """Unpack the packages that the folder lacks.

    Raises CalledProcessError if a package cannot be had: run `apt-get update` first.
    """
    for name in names:
        if (folder / name).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if name == INDEX:
            records = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True)
            (folder / name).write_bytes(records.stdout)
            continue
        with TemporaryDirectory(dir=folder) as scratch:
            subprocess.run(
                ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name],
                cwd=scratch,
                check=True,
            )
            (package,) = Path(scratch).glob("*.deb")
            unpacked = Path(scratch) / "files"
            subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
            unpacked.rename(folder / name)


def read_text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")


# ---------------------------------------------------------------- package records


def read_records(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the fields of each package; `Source` is always there."""
    for paragraph in read_text(folder / INDEX).split("\n\n"):
        lines = re.sub(r"\n\s+", " ", paragraph).splitlines()
        record = dict(line.split(": ", 1) for line in lines if ": " in line)
        if "Package" in record:
            source = record.get("Source", record["Package"])
            yield record | {"Source": source.split()[0]}


# ---------------------------------------------------------------- man pages


@dataclass(frozen=True)
class Page:
    name: str  # "strtok.3"
    title: str  # "extract tokens from strings"
    sections: dict[str, str]  # roff, by title


def read_pages(*folders: Path) -> Iterator[Page]:
    """Yield each page once: links to another page are left out."""
    for folder in folders:
        for path in sorted(folder.glob("man*/*.gz")):
            source = read_text(path)
            parts = re.split(r"^\.SH +\"?(.+?)\"?$", source, flags=re.MULTILINE)
            sections = dict(zip(parts[1::2], parts[2::2], strict=True))
            line = strip_roff(next(iter(sections.values()), ""))
            names, _, title = line.partition(" - ")
            if title and len(names) < 80:
                yield Page(path.stem, title, sections)


def strip_roff(source: str) -> str:
    """Return the text of roff without fonts; paragraphs stay apart."""
    lines: list[str] = []
    for line in source.replace("\\\n", " ").splitlines():
        macro, _, rest = line[1:].partition(" ")
        if line.startswith((".\\", "'\\", '.\\"')):
            continue
        if not line.startswith((".", "'")):
            lines.append(line)
        elif macro in FONTS:
            words = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', rest)]
            lines.append(("" if len(macro) == 2 else " ").join(words))
        elif macro in BREAKS:
            lines.append("\n")
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\[&,/|^%:c]|\\s[-+]?\d", "", "\n".join(lines))
    for roff, plain in (("\\-", "-"), ("\\(aq", "'"), ("\\e", "\\"), ("\\ ", " "), ("\\~", " ")):
        text = text.replace(roff, plain)
    text = re.sub(r"\\(?:\((..)|\[(\w+)\])", _replace_name, text)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(filter(None, paragraphs))


def _replace_name(match: re.Match[str]) -> str:
    names = {"lq": "“", "rq": "”", "dq": '"', "em": "—", "en": "-", "bu": "-", "co": "©"}
    return names.get(match[1] or match[2], "")
