"""List the mutants of a file: changes that a test should notice.

    Target -> list_mutants -> a sample of what cosmic-ray's operators make of its file
    load_targets, load_by_hand, load_explained -> what the TOML files beside this one name

A mutant is a line before and after. Left out: what Python refuses or warns of, annotations, which
nothing runs, and `is` for `==`, which is equal for small numbers. A position has at most
MAX_PER_POSITION mutants: a `+` alone has eleven.
"""

from __future__ import annotations

import ast
import difflib
import random
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

HERE = Path(__file__).parent
MAX_PER_POSITION = 2
IDENTITY = ("_Eq_Is", "_NotEq_IsNot")
BY_HAND = "by hand"
Position = tuple[int, int]  # line, column


@dataclass(frozen=True)
class Target:
    """A file of the package, the tests that cover it, and how many of its mutants are tried."""

    path: str  # inside src/tunesmith
    tests: tuple[str, ...]  # inside tests
    sample: int


@dataclass(frozen=True)
class Mutant:
    """`source` is the mutated file; `before` and `after` are its changed lines."""

    path: str
    operator: str
    line: int
    before: str
    after: str
    source: str
    tests: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.path, self.before, self.after


def load_targets() -> list[Target]:
    tables = tomllib.loads((HERE / "targets.toml").read_text())["target"]
    return [Target(table["path"], tuple(table["tests"]), table["sample"]) for table in tables]


def load_explained() -> dict[tuple[str, str, str], str]:
    """Return (path, before, after) -> why no test can or should notice the mutant."""
    tables = tomllib.loads((HERE / "explained.toml").read_text()).get("mutant", [])
    return {(row["path"], row["before"], row["after"]): row["reason"] for row in tables}


def load_by_hand(package: Path) -> list[Mutant]:
    """Return mutants that no operator makes. Raises ValueError if the file has changed."""
    mutants: list[Mutant] = []
    for table in tomllib.loads((HERE / "by_hand.toml").read_text()).get("mutant", []):
        source = (package / table["path"]).read_text()
        if source.count(table["before"]) != 1:
            raise ValueError(f"{table['path']} does not hold once: {table['before']}")
        mutated = source.replace(table["before"], table["after"])
        line = source[: source.index(table["before"])].count("\n") + 1
        mutants.append(
            Mutant(
                table["path"],
                BY_HAND,
                line,
                table["before"].strip(),
                table["after"].strip(),
                mutated,
                tuple(table["tests"]),
            )
        )
    return mutants


def list_mutants(target: Target, package: Path, seed: int) -> tuple[list[Mutant], int]:
    """Return the sample of a target's mutants, and how many there are."""
    source = (package / target.path).read_text()
    changes = _list_changes(source)
    random.Random(f"{seed} {target.path}").shuffle(changes)
    counts: Counter[Position] = Counter()
    limited: list[tuple[str, int]] = []
    for name, occurrence, position in changes:
        counts[position] += 1
        if counts[position] <= MAX_PER_POSITION:
            limited.append((name, occurrence))
    mutants: list[Mutant] = []
    for name, occurrence in limited:
        if len(mutants) == target.sample:
            break
        try:
            mutated = mutate_code(source, get_operator(name)(), occurrence)
        except AttributeError:  # cosmic-ray cannot replace an exception named `module.Error`
            continue
        if mutated is not None and _is_valid(mutated):
            mutants.append(_make_mutant(target, name.removeprefix("core/"), source, mutated))
    return mutants, len(limited)


def _list_changes(source: str) -> list[tuple[str, int, Position]]:
    """Return (operator, its how manieth occurrence, position) of each mutant."""
    nodes = list(ast_nodes(get_ast(source)))
    annotations = list(_iter_annotations(source))
    changes: list[tuple[str, int, Position]] = []
    for name in operator_names():
        operator_class = get_operator(name)
        if operator_class.arguments() or name.endswith(IDENTITY):
            continue
        operator = operator_class()
        positions: list[Position] = []
        for node in nodes:
            positions += [start for start, _ in operator.mutation_positions(node)]
        for occurrence, position in enumerate(positions):
            if not any(start <= position < end for start, end in annotations):
                changes.append((name, occurrence, position))
    return changes


def _iter_annotations(source: str) -> Iterator[tuple[Position, Position]]:
    """Yield (start, end) of each annotation, as (line, column)."""
    for node in ast.walk(ast.parse(source)):
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        if isinstance(annotation, ast.expr):
            start = (annotation.lineno, annotation.col_offset)
            yield (
                start,
                (annotation.end_lineno or annotation.lineno, annotation.end_col_offset or 0),
            )


def _is_valid(source: str) -> bool:
    """Whether Python compiles a mutant without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            compile(source, "mutant", "exec")
        except (SyntaxError, SyntaxWarning):
            return False
    return True


def _make_mutant(target: Target, operator: str, source: str, mutated: str) -> Mutant:
    removed: list[str] = []
    added: list[str] = []
    line = 0
    for text in difflib.unified_diff(source.splitlines(), mutated.splitlines(), n=0, lineterm=""):
        if text.startswith("@@"):
            line = line or int(text.split()[1].split(",")[0].lstrip("-"))
        elif text.startswith("-") and not text.startswith("---"):
            removed.append(text[1:].strip())
        elif text.startswith("+") and not text.startswith("+++"):
            added.append(text[1:].strip())
    before = " ".join(removed)
    return Mutant(target.path, operator, line, before, " ".join(added), mutated, target.tests)
