"""Every setting of the plan is decided by something and read by the run."""

import ast
import dataclasses
from pathlib import Path

import pytest

from tunesmith.core.types import PlanConfig

SOURCE = Path(__file__).parents[2] / "src" / "tunesmith"
SETTINGS = {field.name for field in dataclasses.fields(PlanConfig)}
# Settings that only report what something else has decided: the recipe (chat_template, never), the
# tokenizer (separator).
REPORTED_ONLY = {"chat_template", "never", "separator"}


def parse_files(*patterns: str) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for pattern in patterns:
        for file in SOURCE.glob(pattern):
            nodes += ast.walk(ast.parse(file.read_text()))
    return nodes


def is_subscript_of(node: ast.AST, name: str) -> bool:
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
        and isinstance(node.slice, ast.Constant)
    )


@pytest.mark.promise
def test_every_setting_is_read_by_the_run() -> None:
    read: set[str] = set()
    for node in parse_files("[!p]*/**/*.py"):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("config"):
            read.add(node.attr)
        elif is_subscript_of(node, "settings"):  # of an adapter
            read.add(node.slice.value)
    assert SETTINGS - read == REPORTED_ONLY


def test_every_setting_is_decided() -> None:
    files = (
        "plan/*.py",
        "session/planner.py",
        "session/adapter_settings.py",
        "train/stages.py",
    )
    decided: set[str] = set()
    for node in parse_files(*files):
        if isinstance(node, ast.Constant):
            decided.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg:
            decided.add(node.arg)
    assert SETTINGS - decided == set()


def test_rules_read_settings_that_exist() -> None:
    read = {
        node.slice.value
        for node in parse_files("plan/*.py")
        if is_subscript_of(node, "context") or is_subscript_of(node, "self")
    }
    assert "learning_rate" in read
    assert read - SETTINGS == set()
