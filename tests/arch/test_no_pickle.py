"""Nothing in the package can run what a file holds: no pickle, no open template engine, no YAML
objects, no eval."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    *(
        "torch.load",
        "torch.save",
        "torch.jit.load",
        "torch.hub.load",
        "np.load",
        "numpy.load",
        "pd.read_pickle",
    ),
    *(
        "jinja2.Environment",
        "jinja2.Template",
        "Environment",
        "NativeEnvironment",
        "SandboxedEnvironment",
        "Template",
    ),
    *(
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "eval",
        "exec",
        "compile",
        "os.system",
        "__import__",
    ),
}
# Templates of the report and of start files, which no model and no user can add to.
ALLOWED = {"report/html.py": ["Environment"], "export/servers.py": ["Environment"]}
SWITCHES = {
    "trust_remote_code": False,
    "use_safetensors": True,
    "allow_pickle": False,
    "shell": False,
}


def breaches(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (
                f"import {name.name}"
                for name in node.names
                if name.name.partition(".")[0] in MODULES
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield f"from {node.module}"
        elif isinstance(node, ast.Call):
            if (called := ast.unparse(node.func)) in CALLS:
                yield called
            for word in node.keywords:
                if word.arg in SWITCHES and ast.unparse(word.value) != str(SWITCHES[word.arg]):
                    yield f"{word.arg}={ast.unparse(word.value)}"


@pytest.mark.promise
def test_no_file_opens_a_pickle_or_runs_what_it_reads() -> None:
    sources = {
        path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")
    }
    names = {path: list(breaches(source)) for path, source in sources.items()}
    assert {path: calls for path, calls in names.items() if calls} == ALLOWED
    assert len(sources) > 60


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "state = torch.load(file, weights_only=True)",
        "torch.save(state, file)",
        "text = Environment().from_string(source)",
        "jinja2.Template(source).render()",
        "AutoModel.from_pretrained(folder, trust_remote_code=recipe.trust)",
        "AutoModel.from_pretrained(folder, use_safetensors=None)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
    ],
)
def test_a_breach_is_noticed(line: str) -> None:
    assert list(breaches(line))


def test_what_is_safe_is_no_breach() -> None:
    lines = (
        "re.compile(text)",
        "environment.compile(tree)",
        "yaml.safe_load(text)",
        "model.network.eval()",
    )
    assert [list(breaches(line)) for line in lines] == [[], [], [], []]
