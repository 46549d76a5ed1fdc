"""Write docs/results/mutation.md from the results of a mutation run.

In: a row per mutant, the number of mutants of each file. Out: the page, with a table per question:
the score of each file, the mutants made by hand, the survivors that are explained, and those that
are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.mutation.mutants import load_explained

HEADER = """# Results: mutation run

Would a test notice if the exactness and evidence code were wrong? `make mutation` changes one place
at a time (operators, numbers, conditions, loops, exceptions, decorators; cosmic-ray {version}) and
runs the unit tests of that file. {date}; a random sample per file, seed {seed}. A mutant is killed
if a test fails or does not end ({timeouts} did not). Explained survivors change
nothing that is promised, for the reason in a table below. Score: (killed + explained) / tried.

| file | mutants in all | tried | killed | survived | explained | score |
|---|---|---|---|---|---|---|
"""
BY_HAND_HEADER = """
## Mutants made by hand

Changes that none of the operators makes, or that once went unnoticed.

| file | before | after | result |
|---|---|---|---|
"""
EXPLAINED_HEADER = """
## Survivors, explained

| file | before | after | why it changes nothing |
|---|---|---|---|
"""
OPEN_HEADER = """
## Survivors, open

| file | before | after |
|---|---|---|
"""

Row = dict[str, object]


def write_page(page: Path, rows: Sequence[Row], totals: dict[str, int], seed: int) -> None:
    explained = load_explained()
    sampled = [row for row in rows if not row["by_hand"]]
    timeouts = sum(row["outcome"] == "timeout" for row in sampled)
    text = HEADER.format(
        version=version("cosmic-ray"), date=date.today(), seed=seed, timeouts=timeouts
    )
    text += "".join(_iter_scores(sampled, totals, explained))
    text += BY_HAND_HEADER
    for row in rows:
        if row["by_hand"]:
            text += _format_row(row, str(row["outcome"]))
    survivors = [row for row in sampled if row["outcome"] == "survived"]
    text += EXPLAINED_HEADER
    for row in survivors:
        if _get_key(row) in explained:
            text += _format_row(row, explained[_get_key(row)])
    unexplained = [row for row in survivors if _get_key(row) not in explained]
    if unexplained:
        text += OPEN_HEADER + "".join(_format_row(row) for row in unexplained)
    page.write_text(text)


def _iter_scores(
    rows: Sequence[Row], totals: dict[str, int], explained: dict[tuple[str, str, str], str]
) -> Iterator[str]:
    sums = [0, 0, 0, 0, 0]
    for path, total in totals.items():
        tried = [row for row in rows if row["path"] == path]
        survivors = [row for row in tried if row["outcome"] == "survived"]
        num_explained = sum(_get_key(row) in explained for row in survivors)
        killed = len(tried) - len(survivors)
        counts = [total, len(tried), killed, len(survivors), num_explained]
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        yield _format_score(f"`{path}`", counts)
    yield _format_score("all", sums)


def _format_score(name: str, counts: Sequence[int]) -> str:
    _, tried, killed, _, explained = counts
    share = (killed + explained) / tried if tried else 0.0
    return f"| {name} | {' | '.join(map(str, counts))} | {share:.0%} |\n"


def _format_row(row: Row, *cells: str) -> str:
    location = f"`{row['path']}:{row['line']}`"
    code = [f"`` {str(row[side]).replace('|', '&#124;')} ``" for side in ("before", "after")]
    return "| " + " | ".join([location, *code, *cells]) + " |\n"


def _get_key(row: Row) -> tuple[str, str, str]:
    return str(row["path"]), str(row["before"]), str(row["after"])
