"""Chat templates of strangers are compiled in one file, in sandboxed environments, and rendered
nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import jinja2
import jinja2.nativetypes
import jinja2.sandbox
import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
ENVIRONMENTS = {
    name
    for module in (jinja2, jinja2.sandbox, jinja2.nativetypes)
    for name, found in vars(module).items()
    if isinstance(found, type) and issubclass(found, (jinja2.Environment, jinja2.Template))
}
OURS = {"SandboxEnvironment", "TrackedEnvironment", "PlainEnvironment"}
MAKING = {"from_string", "get_template", "select_template", "overlay", "apply_chat_template"}
ALLOWED = {
    ("data/chat_template/sandbox.py", "ImmutableSandboxedEnvironment"),  # the base of ours
    ("data/chat_template/compiled_template.py", "SandboxEnvironment"),  # a type
    ("data/chat_template/compiled_template.py", "Template"),
    ("data/chat_template/compiled_template.py", "TrackedEnvironment"),
    ("data/chat_template/compiled_template.py", "PlainEnvironment"),
    ("model/causal_lm.py", "apply_chat_template"),  # the second opinion: transformers' own render
    ("report/html.py", "Environment"),  # our own templates, never a stranger's
    ("report/html.py", "get_template"),
    ("export/servers.py", "Environment"),
    ("export/servers.py", "get_template"),
}


def uses(source: str) -> Iterator[str]:
    """Names by which a template could be compiled or rendered."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            theirs = (node.module or "").partition(".")[0] == "jinja2"
            yield from (
                one.name for one in node.names if one.name in (ENVIRONMENTS if theirs else OURS)
            )
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name.partition(".")[0] == "jinja2")
        elif isinstance(node, ast.Attribute) and node.attr in MAKING:
            yield node.attr


@pytest.mark.promise
def test_one_file_makes_environments() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        for name in uses(path.read_text())
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "from jinja2 import Environment",
        "from jinja2.sandbox import SandboxedEnvironment as Safe",
        "from jinja2.nativetypes import NativeEnvironment",
        "import jinja2.sandbox as js",
        "from tunesmith.data.chat_template.sandbox import TrackedEnvironment",
        "environment.from_string(source)",
        "tokenizer.apply_chat_template(messages)",
    ],
)
def test_a_second_one_would_be_noticed(line: str) -> None:
    assert list(uses(line))


def test_the_two_environments_are_sandboxed() -> None:
    from tunesmith.data.chat_template.sandbox import (
        PlainEnvironment,
        SandboxEnvironment,
        TrackedEnvironment,
    )

    assert issubclass(SandboxEnvironment, jinja2.sandbox.ImmutableSandboxedEnvironment)
    assert issubclass(TrackedEnvironment, SandboxEnvironment)
    assert issubclass(PlainEnvironment, SandboxEnvironment)
