"""Measure the speed and memory of `data check`, near-duplicate detection included.

    python -m benchmarks.data.audit TEXTS [ROWS ...]  prints a table of docs/results/data-check.md

TEXTS is a folder with texts at any depth (.txt, .pod, .dict.dz), such as /usr/share with the Debian
packages linux-doc, python3-doc, perl-doc, dict-gcide, dict-wn and dict-foldoc. A row is a question
and an answer of about 2 kB in one of four frames, made of sentences drawn from all texts: letters,
symbols and addresses are real, and rows do not resemble each other by chance. One row in 20 is a
near duplicate of an earlier one, one in 100 an exact duplicate; the table compares the duplicates
detected with those planted.

Each size runs in its own process. Memory is the peak of the process, libraries included. Other load
on the machine affects wall time but hardly CPU time.
"""

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
PATTERNS = ("*.txt", "*.pod", "*.dict.dz")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
SENTENCE_CHARS = range(40, 401)
MIN_QUESTION_CHARS = 1300
MIN_ANSWER_CHARS = 550
DUPLICATE_EVERY = 20  # rows; near or exact
EXACT_EVERY = 100
MAX_ORIGINALS = 10_000  # earlier rows to copy from


def load_sentences(folder: Path) -> list[str]:
    """Return the distinct sentences of all texts in a folder, in a fixed order."""
    paths: list[Path] = []
    for pattern in PATTERNS:
        paths += [path for path in folder.rglob(pattern) if path.is_file()]
    sentences: dict[str, None] = {}
    for path in sorted(paths):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".dz" else data).decode(errors="replace")
        for part in SENTENCE_END.split(text):
            sentence = " ".join(part.split())
            if len(sentence) in SENTENCE_CHARS:
                sentences[sentence] = None
    return list(sentences)


def generate_rows(count: int, sentences: list[str]) -> Iterator[dict[str, Any]]:
    """Yield rows with planted near and exact duplicates."""
    rng = random.Random(0)
    originals: list[tuple[str, str]] = []
    for number in range(count):
        if originals and number % DUPLICATE_EVERY == 0:
            prompt, answer = rng.choice(originals)
            if number % EXACT_EVERY:
                prompt = _replace_words(prompt, rng)
                answer = _replace_words(answer, rng)
        else:
            prompt = _draw_text(sentences, MIN_QUESTION_CHARS, rng)
            answer = _draw_text(sentences, MIN_ANSWER_CHARS, rng)
            if len(originals) < MAX_ORIGINALS:
                originals.append((prompt, answer))
        question = f"{FRAMES[number % len(FRAMES)]}\n\n{prompt}"
        user = {"role": "user", "content": question}
        assistant = {"role": "assistant", "content": answer}
        yield {"messages": [user, assistant]}


def _draw_text(sentences: list[str], min_chars: int, rng: random.Random) -> str:
    drawn: list[str] = []
    while sum(map(len, drawn)) < min_chars:
        drawn.append(rng.choice(sentences))
    return " ".join(drawn)


def _replace_words(text: str, rng: random.Random) -> str:
    """Replace two words, which keeps at least 80% of the 5-word shingles."""
    words = text.split(" ")
    for _ in range(2):
        words[rng.randrange(len(words))] = f"changed{rng.randrange(1000)}"
    return " ".join(words)


def measure_check(path: Path) -> dict[str, Any]:
    """Run `data check` on a file in this process."""
    wall_start = time.perf_counter()
    cpu_start = time.process_time()
    report = tunesmith.data_check(model=MODEL, data=str(path))["data"]
    counts = {finding.check: finding.count for finding in report.findings}
    return {
        "rows": report.rows,
        "wall": time.perf_counter() - wall_start,
        "cpu": time.process_time() - cpu_start,
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "duplicates": counts.get("near_duplicates", 0) + counts.get("duplicates", 0),
        "findings": counts,
    }


def run_size(size: int, sentences: list[str], path: Path) -> str:
    """Write `size` rows, check them in another process, and return the table row."""
    with path.open("w") as file:
        for row in generate_rows(size, sentences):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    command = [sys.executable, "-m", "benchmarks.data.audit", "--measure", str(path)]
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    sys.stderr.write(f"{result}\n")
    cpu_minutes = result["cpu"] / 60
    planted = len(range(DUPLICATE_EVERY, size, DUPLICATE_EVERY))
    cells = (
        f"{size:,}",
        f"{path.stat().st_size / 1e6:,.0f} MB",
        f"{result['wall'] / 60:.1f}",
        f"{cpu_minutes:.1f}",
        f"{size / cpu_minutes:,.0f}",
        f"{result['bytes'] / 1e9:.2f} GB",
        f"{result['duplicates'] / planted:.1%}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    if sys.argv[1] == "--measure":
        sys.stdout.write(json.dumps(measure_check(Path(sys.argv[2]))))
        return
    sentences = load_sentences(Path(sys.argv[1]))
    sys.stderr.write(f"{len(sentences):,} sentences, {sum(map(len, sentences)) / 1e6:,.0f} MB\n")
    sizes = [int(size) for size in sys.argv[2:]] or ROWS
    print(
        "| rows | file | minutes | CPU minutes | rows/CPU minute | memory | duplicates detected |"
    )
    print("|---|---|---|---|---|---|---|")
    with TemporaryDirectory(dir="/var/tmp") as folder:
        for size in sizes:
            print(run_size(size, sentences, Path(folder) / "rows.jsonl"), flush=True)


if __name__ == "__main__":
    main()
