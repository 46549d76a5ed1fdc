"""Measure speed and memory of the parse-only pass over about 200 MB in each file type.

    python -m benchmarks.data.readers        prints the table of docs/results/data-check.md

Each file is read in its own process. Rows are random words, about 2 kB each. Speed is per second of
CPU time, which other load on the machine hardly affects; memory is what the pass adds at its peak.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from tunesmith.core.hardware import read_peak_bytes, reset_peak
from tunesmith.data.dataset import open_dataset
from tunesmith.recipe.fields import DataSource

ROWS = 100_000
FILES = 20_000  # of the folder of texts
PHRASES = (
    "answer the question about the weather in the old town",
    "größer",
    "日本",
    "\n\n",
    "12,345.6",
    '"quoted"',
)


def generate_rows() -> Iterator[dict[str, str]]:
    rng = random.Random(0)
    words = " ".join(PHRASES).split(" ") + [f"word{n}" for n in range(500)]
    for number in range(ROWS):
        prompt = " ".join(rng.choices(words, k=200))
        answer = " ".join(rng.choices(words, k=80))
        yield {"prompt": f"{number} {prompt}", "completion": answer}


def write_lines(path: Path) -> None:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        for row in generate_rows():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_array(path: Path) -> None:
    with path.open("w") as file:
        file.write("[")
        for number, row in enumerate(generate_rows()):
            separator = "," if number else ""
            file.write(separator + json.dumps(row, ensure_ascii=False))
        file.write("]")


def write_table(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(generate_rows())


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(generate_rows())), path)


def write_folder(path: Path) -> None:
    path.mkdir()
    rows = generate_rows()
    for number in range(FILES):
        texts = [row["prompt"] + row["completion"] for row in islice(rows, ROWS // FILES)]
        (path / f"{number}.txt").write_text("\n\n".join(texts))


FILE_TYPES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "JSON lines": ("x.jsonl", write_lines),
    "JSON array": ("x.json", write_array),
    "CSV": ("x.csv", write_table),
    "JSON lines, gzip": ("x.jsonl.gz", write_lines),
    "Parquet": ("x.parquet", write_parquet),
    "folder of texts": ("texts", write_folder),
}


def measure_pass(path: Path) -> dict[str, Any]:
    """Parse a file in this process."""
    renderer: Any = SimpleNamespace(has_template=True)
    source = DataSource.model_validate({"path": str(path)})
    reset_peak()
    bytes_before = read_peak_bytes()
    wall_start = time.perf_counter()
    cpu_start = time.process_time()
    num_rows = len(open_dataset([source], renderer))
    return {
        "rows": num_rows,
        "seconds": time.process_time() - cpu_start,
        "wall": time.perf_counter() - wall_start,
        "bytes": read_peak_bytes() - bytes_before,
    }


def run_file_type(name: str, path: Path) -> str:
    """Parse a file in another process and return the table row."""
    files = path.iterdir() if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    command = [sys.executable, "-m", "benchmarks.data.readers", str(path)]
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    speed = result["rows"] / result["seconds"]
    cells = (
        name,
        f"{size / 1e6:,.0f} MB",
        f"{result['rows']:,}",
        f"{speed:,.0f}",
        f"{result['bytes'] / 1e6:.0f} MB",
    )
    line = "| " + " | ".join(cells) + " |"
    sys.stderr.write(f"{line} {result}\n")
    return line


def main() -> None:
    if len(sys.argv) == 2:
        sys.stdout.write(json.dumps(measure_pass(Path(sys.argv[1]))))
        return
    lines = [
        "| file | size | rows | rows per second | peak memory added |",
        "|---|---|---|---|---|",
    ]
    with TemporaryDirectory(dir="/var/tmp") as folder:
        for kind, (name, write) in FILE_TYPES.items():
            path = Path(folder) / name
            write(path)
            lines.append(run_file_type(kind, path))
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
