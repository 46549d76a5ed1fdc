"""How fast rows are read, and in how much memory: the parse-only pass over 200 MB in each kind of
file.

    python -m benchmarks.data.readers        prints the table of docs/guides/data.md

One process a file. Rows are random words, about 2 kB each. Seconds are of the processor, so other
work on the machine shows little; memory is what the pass adds at its peak to what the process had
before it."""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from tunesmith.data.dataset import open_dataset
from tunesmith.recipe.fields import DataSource

ROWS, FILES = 100_000, 20_000
STEPS = (
    "answer the question about the weather in the old town",
    "größer",
    "日本",
    "\n\n",
    "12,345.6",
    '"quoted"',
)


def rows() -> Iterator[dict[str, str]]:
    chance = random.Random(0)
    words = [word for step in STEPS for word in step.split(" ")] + [f"word{n}" for n in range(500)]
    for number in range(ROWS):
        prompt, answer = (" ".join(chance.choices(words, k=count)) for count in (200, 80))
        yield {"prompt": f"{number} {prompt}", "completion": answer}


def write_lines(path: Path) -> None:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())


def write_array(path: Path) -> None:
    with path.open("w") as file:
        file.write("[")
        file.writelines(
            ("," if n else "") + json.dumps(row, ensure_ascii=False) for n, row in enumerate(rows())
        )
        file.write("]")


def write_table(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows())


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows())), path)


def write_folder(path: Path) -> None:
    path.mkdir()
    source, each = rows(), ROWS // FILES
    for number in range(FILES):
        text = "\n\n".join(
            row["prompt"] + row["completion"] for row, _ in zip(source, range(each), strict=False)
        )
        (path / f"{number}.txt").write_text(text)


KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "JSON lines": ("x.jsonl", write_lines),
    "JSON array": ("x.json", write_array),
    "CSV": ("x.csv", write_table),
    "JSON lines, gzip": ("x.jsonl.gz", write_lines),
    "Parquet": ("x.parquet", write_parquet),
    "folder of texts": ("texts", write_folder),
}


def memory(name: str) -> int:
    """Bytes, from the kernel: VmRSS now, VmHWM at most since the mark was reset."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def measure(path: Path) -> dict[str, Any]:
    """The pass over one file, in this process."""
    renderer: Any = SimpleNamespace(has_template=True)
    Path("/proc/self/clear_refs").write_text("5")
    before, wall, started = memory("VmRSS"), time.perf_counter(), time.process_time()
    found = len(open_dataset([DataSource.model_validate({"path": str(path)})], renderer))
    return {
        "rows": found,
        "seconds": time.process_time() - started,
        "wall": time.perf_counter() - wall,
        "bytes": memory("VmHWM") - before,
    }


def main() -> None:
    if len(sys.argv) == 2:
        sys.stdout.write(json.dumps(measure(Path(sys.argv[1]))))
        return
    lines = ["| file | size | rows | rows a second | memory, at most |", "|---|---|---|---|---|"]
    with TemporaryDirectory(dir="/var/tmp") as folder:
        for kind, (name, write) in KINDS.items():
            path = Path(folder) / name
            write(path)
            size = (
                sum(file.stat().st_size for file in path.iterdir())
                if path.is_dir()
                else path.stat().st_size
            )
            command = [sys.executable, "-m", "benchmarks.data.readers", str(path)]
            found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            speed, used = found["rows"] / found["seconds"], found["bytes"] / 1e6
            lines.append(
                f"| {kind} | {size / 1e6:,.0f} MB | {found['rows']:,} | {speed:,.0f} | {used:.0f} MB |"
            )
            sys.stderr.write(f"{lines[-1]} {found}\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
