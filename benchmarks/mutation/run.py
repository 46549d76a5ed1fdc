"""Mutation run: do the tests notice when the exactness and evidence code is wrong? `make mutation`

    python -m benchmarks.mutation.run [--jobs 2] [--files losses,packing] [--fresh]

In: targets.toml (files and their tests), by_hand.toml, explained.toml. Out: build/mutation.jsonl,
one line per mutant, and docs/results/mutation.md. The tests are imported once, and each mutant is
tried in a fork: no file is changed, so tests that start processes run the original there. A mutant
that was killed is not tried again unless its file has changed; survivors are.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from benchmarks.mutation.code_swap import MutantFinder, swap_functions
from benchmarks.mutation.mutants import (
    BY_HAND,
    Mutant,
    Target,
    list_mutants,
    load_by_hand,
    load_explained,
    load_targets,
)
from benchmarks.mutation.page import write_page

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/tunesmith"
RESULTS = ROOT / "build/mutation.jsonl"
PAGE = ROOT / "docs/results/mutation.md"
SEED = 0
CPU_SECONDS = 20  # of one mutant: an endless loop
TIMEOUT_SECONDS = 200  # a deadlock
PYTEST_FLAGS = (
    *("-x", "-qq", "--no-header", "--tb=no"),
    *("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "benchmarks.mutation.no_shrink"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # plugins were imported before the fork
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--files", default="", help="only targets whose path holds one of these")
    parser.add_argument("--seed", type=int, default=SEED, help="another sample; writes no page")
    parser.add_argument("--limit", type=int, default=1000, help="mutants per file")
    parser.add_argument("--report", action="store_true", help="only write the page")
    parser.add_argument("--trust-tests", action="store_true", help="do not run them unchanged")
    parser.add_argument("--fresh", action="store_true", help="try killed mutants again")
    options = parser.parse_args()
    words = options.files.split(",")
    targets: list[Target] = []
    for target in load_targets():
        if any(word in target.path for word in words):
            targets.append(target)
    by_hand = [m for m in load_by_hand(PACKAGE) if any(word in m.path for word in words)]
    RESULTS.parent.mkdir(exist_ok=True)
    results = {} if options.fresh else read_results()
    mutants: list[Mutant] = list(by_hand)
    totals: dict[str, int] = {}
    for target in targets:
        sample, totals[target.path] = list_mutants(target, PACKAGE, options.seed)
        mutants += sample[: options.limit]
        print(f"{target.path}: {len(sample)} of {totals[target.path]} mutants", flush=True)
    pending = [mutant for mutant in mutants if not is_settled(mutant, results)]
    if options.report:
        pending = []
    print(f"{len(mutants)} mutants, {len(pending)} to try", flush=True)
    for number, row in enumerate(try_mutants(pending, options), start=1):
        results[make_key(row)] = row
        print(f"{number}/{len(pending)} {describe(row)}", flush=True)
        write_results(results.values())
    if words == [""] and options.seed == SEED:
        current: list[dict[str, object]] = []
        for mutant in mutants:
            row = results.get(mutant.key, {})
            if row.get("sha256") == hash_text(mutant.source):
                current.append(row)
        write_page(PAGE, current, totals, SEED)


def make_key(row: dict[str, object]) -> tuple[str, str, str]:
    return str(row["path"]), str(row["before"]), str(row["after"])


def is_settled(mutant: Mutant, results: dict[tuple[str, str, str], dict[str, object]]) -> bool:
    """Whether a mutant of the same file was killed before, or its survival is explained."""
    row = results.get(mutant.key, {})
    is_same = row.get("sha256") == hash_text(mutant.source)
    return is_same and (row["outcome"] != "survived" or mutant.key in load_explained())


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_results() -> dict[tuple[str, str, str], dict[str, object]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {make_key(row): row for row in rows}


def write_results(rows: Iterable[dict[str, object]]) -> None:
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def describe(row: dict[str, object]) -> str:
    result = f"{row['outcome']} {row['seconds']} s {row['path']}:{row['line']}"
    return (
        result
        if row["outcome"] == "killed"
        else f"{result}\n  - {row['before']}\n  + {row['after']}"
    )


# ---------------------------------------------------------------- processes


def try_mutants(
    mutants: Sequence[Mutant], options: argparse.Namespace
) -> Iterator[dict[str, object]]:
    """Yield a result for each mutant. Raises SystemExit if the tests fail without a mutant."""
    collect_tests(mutants)
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        test_sets = sorted({mutant.tests for mutant in mutants if not options.trust_tests})
        for tests, outcome in pool.imap_unordered(try_unchanged, test_sets):
            if outcome != "survived":
                sys.exit(f"{outcome} without a mutant: {' '.join(tests)}")
        yield from pool.imap_unordered(try_mutant, mutants)


def collect_tests(mutants: Sequence[Mutant]) -> None:
    """Import all tests, so that every fork has them."""
    os.chdir(ROOT)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT / "src"))
    tests: set[str] = set()
    for mutant in mutants:
        tests.update(f"tests/{test.split('::')[0]}" for test in mutant.tests)
    with open_sink():
        pytest.main(["--collect-only", *PYTEST_FLAGS, *sorted(tests)])
    # A fork shares memory until it is written to, and the collector would write to all objects.
    gc.collect()
    gc.disable()
    gc.freeze()


@contextlib.contextmanager
def open_sink() -> Iterator[None]:
    """Drop what is written to stdout and stderr, by subprocesses, too."""
    saved = [os.dup(1), os.dup(2)]
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    yield
    os.dup2(saved[0], 1)
    os.dup2(saved[1], 2)
    for descriptor in (*saved, sink):
        os.close(descriptor)


def try_unchanged(tests: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    return tests, run_in_fork(tests)


def try_mutant(mutant: Mutant) -> dict[str, object]:
    start = time.monotonic()
    outcome = run_in_fork(mutant.tests, mutant)
    return {
        "path": mutant.path,
        "by_hand": mutant.operator == BY_HAND,
        "operator": mutant.operator,
        "line": mutant.line,
        "before": mutant.before,
        "after": mutant.after,
        "outcome": outcome,
        "seconds": round(time.monotonic() - start, 1),
        "sha256": hash_text(mutant.source),
    }


def run_in_fork(tests: Sequence[str], mutant: Mutant | None = None) -> str:
    """Return "killed", "timeout" or "survived"."""
    process = os.fork()
    if not process:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        status = 1
        try:
            if mutant is not None:
                apply_mutant(mutant)
            with open_sink():
                status = min(1, pytest.main([*PYTEST_FLAGS, *(f"tests/{name}" for name in tests)]))
        finally:
            os._exit(status)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        finished, status = os.waitpid(process, os.WNOHANG)
        if finished and os.WIFSIGNALED(status):
            return "timeout"
        if finished:
            return "killed" if status else "survived"
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return "timeout"


def apply_mutant(mutant: Mutant) -> None:
    """Swap the changed functions, or import our modules anew where that is not enough."""
    name = "tunesmith." + mutant.path.removesuffix(".py").replace("/", ".")
    path = PACKAGE / mutant.path
    if name in sys.modules and swap_functions(sys.modules[name], path.read_text(), mutant.source):
        return
    folders = (str(PACKAGE), str(ROOT / "tests"))
    for loaded, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(folders):
            del sys.modules[loaded]
    sys.meta_path.insert(0, MutantFinder(name, path, mutant.source))


if __name__ == "__main__":
    main()
