"""How many rows a minute the data check reads, near duplicates included, and in how much memory.

    python -m benchmarks.audit [ROWS]        prints the table of docs/data.md

One process a size, the whole verb on a JSONL file: rows of about 2 kB, random words in a frame that all of them have;
one in twenty is a near copy of an earlier one, one in a hundred an equal one. What was planted is counted against what
was found. Memory is the peak of the process, libraries included.
"""

from __future__ import annotations

import json
import random
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
FRAME = "Read the report of the station and say in a few sentences what has to be done, and by whom."
NEAR, EQUAL = 20, 100  # one row in so many
KEPT = 1000  # earlier rows that are copied from


def rows(count: int) -> Iterator[dict[str, Any]]:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghilmnoprstuvw", k=chance.randint(2, 9))) for _ in range(20_000)]
    kept: list[tuple[list[str], list[str]]] = []
    for number in range(count):
        prompt, answer = chance.choices(words, k=200), chance.choices(words, k=80)
        if kept and number % NEAR == 0:
            prompt, answer = ([*part] for part in chance.choice(kept))
            if number % EQUAL:
                answer[chance.randrange(80)] = prompt[chance.randrange(200)] = "changed"
        elif len(kept) < KEPT:
            kept.append((prompt, answer))
        turns = (f"{FRAME}\n\n{' '.join(prompt)}", f"{' '.join(answer).capitalize()}.")
        yield {
            "messages": [
                {"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)
            ]
        }


def measure(path: Path) -> dict[str, Any]:
    """The verb, in this process."""
    started, used = time.perf_counter(), time.process_time()
    found = tunesmith.data_check(model=MODEL, data=str(path))["data"]
    counts = {finding.check: finding.count for finding in found.findings}
    return {
        "rows": found.rows,
        "wall": time.perf_counter() - started,
        "seconds": time.process_time() - used,
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "copies": counts.get("near_duplicates", 0) + counts.get("duplicates", 0),
    }


def main() -> None:
    if len(sys.argv) == 2 and not sys.argv[1].isdigit():
        sys.stdout.write(json.dumps(measure(Path(sys.argv[1]))))
        return
    sizes = (int(sys.argv[1]),) if len(sys.argv) == 2 else ROWS
    print("| rows | file | minutes | rows a minute | memory | copies found, of those planted |")
    print("|---|---|---|---|---|---|")
    with TemporaryDirectory(dir="/var/tmp") as folder:
        for size in sizes:
            path = Path(folder) / "rows.jsonl"
            with path.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows(size))
            command = [sys.executable, "-m", "benchmarks.audit", str(path)]
            found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            planted = len(range(NEAR, size, NEAR))
            speed, share = 60 * found["rows"] / found["wall"], found["copies"] / planted
            print(
                f"| {size:,} | {path.stat().st_size / 1e6:,.0f} MB | {found['wall'] / 60:.1f} | {speed:,.0f} "
                f"| {found['bytes'] / 1e9:.2f} GB | {share:.1%} |"
            )
            sys.stderr.write(f"{found}\n")


if __name__ == "__main__":
    main()
