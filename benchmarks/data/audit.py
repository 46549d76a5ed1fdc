"""How many rows a minute the data check reads, near duplicates included, and in how much memory.

    python -m benchmarks.data.audit TEXTS [ROWS ...]        prints the table of docs/guides/data.md

TEXTS: a folder of real texts (.txt, .pod, .dict.dz, at any depth), such as /usr/share with the
Debian packages linux-doc, python3-doc, perl-doc, dict-gcide, dict-wn and dict-foldoc. A row is a
question and an answer of about 2 kB in one of four frames, made of sentences drawn from all of the
texts: letters, signs and addresses are real, and no two rows say the same by chance. One in twenty
is a near copy of an earlier one, one in a hundred an equal one; what was planted is counted against
what was found.

One process a size runs the whole verb on a JSONL file; memory is its peak, libraries included. Its
CPU time is hardly changed by other work on the machine, which the minutes on the clock are."""

from __future__ import annotations

import gzip
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tunesmith

ROWS = (20_000, 100_000)
MODEL = "smollm2-135m-instruct"
FRAMES = (
    "Read the notes below and say in a few sentences what has to be done, and by whom.",
    "Here is a part of a longer text. Write what comes next.",
    "Sum up what follows for a reader who knows nothing about it:",
    "What does this passage say, and what does it leave out?",
)
ENDS = ("*.txt", "*.pod", "*.dict.dz")
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
SHORT, LONG = 40, 400  # characters of a sentence that is used
ASKED, SAID = 1300, 550  # characters of a question and its answer, at least
NEAR, EQUAL = 20, 100  # one row in so many
KEPT = 10_000  # earlier rows that are copied from


def sentences(folder: Path) -> list[str]:
    """Each once, from all texts in a folder, in a fixed order."""
    found: dict[str, None] = {}
    for path in sorted(path for end in ENDS for path in folder.rglob(end) if path.is_file()):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".dz" else data).decode(errors="replace")
        for sentence in map(" ".join, map(str.split, SENTENCE.split(text))):
            if SHORT <= len(sentence) <= LONG:
                found[sentence] = None
    return list(found)


def rows(count: int, texts: list[str]) -> Iterator[dict[str, Any]]:
    chance = random.Random(0)
    kept: list[tuple[str, str]] = []
    for number in range(count):
        if kept and number % NEAR == 0:
            prompt, answer = chance.choice(kept)
            if number % EQUAL:
                prompt, answer = _changed(prompt, chance), _changed(answer, chance)
        else:
            prompt, answer = _drawn(texts, ASKED, chance), _drawn(texts, SAID, chance)
            if len(kept) < KEPT:
                kept.append((prompt, answer))
        turns = (f"{FRAMES[number % len(FRAMES)]}\n\n{prompt}", answer)
        yield {
            "messages": [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), turns, strict=True)
            ]
        }


def _drawn(texts: list[str], size: int, chance: random.Random) -> str:
    found: list[str] = []
    while sum(map(len, found)) < size:
        found.append(chance.choice(texts))
    return " ".join(found)


def _changed(text: str, chance: random.Random) -> str:
    """Two words of it, which leaves at least 80% of its runs of five words as they are."""
    words = text.split(" ")
    for _ in range(2):
        words[chance.randrange(len(words))] = f"changed{chance.randrange(1000)}"
    return " ".join(words)


def measure(path: Path) -> dict[str, Any]:
    """The verb, in this process."""
    started, used = time.perf_counter(), time.process_time()
    found = tunesmith.data_check(model=MODEL, data=str(path))["data"]
    counts = {finding.check: finding.count for finding in found.findings}
    return {
        "rows": found.rows,
        "wall": time.perf_counter() - started,
        "cpu": time.process_time() - used,
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "copies": counts.get("near_duplicates", 0) + counts.get("duplicates", 0),
        "findings": counts,
    }


def main() -> None:
    if sys.argv[1] == "--measure":
        sys.stdout.write(json.dumps(measure(Path(sys.argv[2]))))
        return
    texts = sentences(Path(sys.argv[1]))
    sys.stderr.write(f"{len(texts):,} sentences, {sum(map(len, texts)) / 1e6:,.0f} MB\n")
    sizes = [int(size) for size in sys.argv[2:]] or ROWS
    print(
        "| rows | file | minutes | CPU minutes | rows a minute of CPU time | memory | found, of the planted copies |"
    )
    print("|---|---|---|---|---|---|---|")
    with TemporaryDirectory(dir="/var/tmp") as folder:
        for size in sizes:
            path = Path(folder) / "rows.jsonl"
            with path.open("w") as file:
                file.writelines(
                    json.dumps(row, ensure_ascii=False) + "\n" for row in rows(size, texts)
                )
            command = [sys.executable, "-m", "benchmarks.data.audit", "--measure", str(path)]
            found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            minutes, cpu, megabytes = (
                found["wall"] / 60,
                found["cpu"] / 60,
                path.stat().st_size / 1e6,
            )
            copies = found["copies"] / len(range(NEAR, size, NEAR))
            print(
                f"| {size:,} | {megabytes:,.0f} MB | {minutes:.1f} | {cpu:.1f} | {size / cpu:,.0f} "
                f"| {found['bytes'] / 1e9:.2f} GB | {copies:.1%} |",
                flush=True,
            )
            sys.stderr.write(f"{found}\n")


if __name__ == "__main__":
    main()
