"""No `read_text` or `read_bytes` reads a stranger's file whole: `core/json_io.read_file` has a
limit. The other calls are on the package's own files, or after a look at the size."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
READERS = {"read_text", "read_bytes"}
CHECKED = {  # the size is checked before, or the file has been read with a limit
    "core/hub_repo.py": 1,
    "model/generation/grammar.py": 1,
    "model/gguf/reader.py": 4,  # its own read_bytes, of a mapped file
    "model/save.py": 1,
    "recipe/yaml_lines.py": 1,
    "session/hub_data.py": 1,
    "session/session.py": 1,
    "train/run.py": 1,
}
OWN = {  # of the package, the machine, or what this run has written
    "advise/sweep/trial_study.py": 1,
    "core/atomic.py": 1,
    "core/hardware.py": 1,
    "core/run_dir.py": 2,
    "data/chat_template/template.py": 1,
    "export/ollama.py": 1,
    "model/kernels/build.py": 4,
    "recipe/importers/draft.py": 1,
    "recipe/schema.py": 1,
    "report/page.py": 2,
    "serve/feedback.py": 1,
    "session/doctor.py": 1,
    "session/run_list.py": 2,
    "train/model_card.py": 1,
}


def find_reads(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(function, ast.Attribute) and function.attr in READERS:
            yield f"line {function.lineno}: {function.attr}"


@pytest.mark.promise
def test_no_file_is_read_whole_without_a_limit() -> None:
    counts: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        if num_reads := len(list(find_reads(path.read_text()))):
            counts[path.relative_to(PACKAGE).as_posix()] = num_reads
    assert dict(counts) == CHECKED | OWN


@pytest.mark.parametrize("line", ["text = path.read_text()", "Path(name).read_bytes()"])
def test_another_read_would_be_noticed(line: str) -> None:
    assert list(find_reads(line))
