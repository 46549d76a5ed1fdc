"""Asking for help is quick: no model library is loaded before a verb needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fake_runs
from tunesmith.core.json_io import to_jsonable
from tunesmith.evaluate.results import EvalResults, MetricValues

HEAVY = {"torch", "transformers", "tokenizers", "numpy", "gguf", "safetensors"}
LIBRARIES_OF_MODELS = {"torch", "transformers", "huggingface_hub", "gguf", "safetensors"}

LOADED = "import sys\nprint('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"


def loaded_by(program: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{LOADED}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.rpartition("LOADED ")[2].split())


def verb(*words: str, code: int = 0) -> str:
    """Return a program that calls a verb and checks its exit code."""
    call = f"app.main({list(words)})"
    return (
        f"from tunesmith.cli import app\ntry:\n    {call}\n"
        f"except SystemExit as ended:\n    assert (ended.code or 0) == {code}"
    )


def test_help_loads_nothing_heavy() -> None:
    """One process asks for them all, so nothing that any of them loads is missed."""
    asked = (("--help",), ("--version",), ("train", "--help"), ("data", "show", "--help"))
    assert not loaded_by("\n".join(verb(*words) for words in asked)) & HEAVY


def test_a_start_builds_no_recipe(tmp_path: Path) -> None:
    """Building the classes of recipes and importing asyncio took half of the time to a list of
    runs, to --help and to the completion of a word."""
    fake_runs.write_run(tmp_path / "runs/done", record=fake_runs.make_record())
    calls = (("--help",), ("train", "--help"), ("runs", str(tmp_path)), ("data", "check", "--help"))
    program = "\n".join(verb(*words) for words in calls)
    program += "\nimport sys\nassert 'tunesmith.recipe.schema' not in sys.modules"
    assert not loaded_by(program) & {"asyncio", "filelock", "regex", "yaml"}
    assert "pydantic" in loaded_by("import tunesmith; tunesmith.Recipe")


def test_importing_the_package_loads_no_torch() -> None:
    assert not loaded_by("import tunesmith") & {"torch", "transformers"}


def test_a_verb_without_its_extra_says_what_to_install(tmp_path: Path) -> None:
    """The plain package has none of these libraries."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ndata: d.jsonl\nsweep: {lora_r: [8, 16]}\n")
    libraries = ("optuna", "starlette", "uvicorn", "httpx")
    program = f"import sys\nsys.modules |= dict.fromkeys({libraries})\n"
    program += verb("tune", "sweep", str(recipe), code=2) + "\n"
    program += verb("serve", str(tmp_path), code=2) + "\n"
    program += verb("verify", str(tmp_path), "--url", "http://localhost/v1", code=2)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pip install '.[sweep]' in tunesmith's folder" in done.stderr
    assert "pip install '.[serve]' in tunesmith's folder" in done.stderr
    assert "pip install '.[verify]' in tunesmith's folder" in done.stderr


MODULES_OF_RESULTS = (
    "tunesmith.cli.progress",
    "tunesmith.cli.views.advice",
    "tunesmith.cli.views.curate",
    "tunesmith.cli.views.data",
    "tunesmith.cli.views.plan",
    "tunesmith.cli.views.results",
    "tunesmith.evaluate.model_ref",
    "tunesmith.evaluate.regression_gate",
    "tunesmith.report.page",
    "tunesmith.report.trackers",
)


def test_what_shows_results_loads_no_model_library() -> None:
    """`compare`, `report` and `eval` of finished runs read files of a run folder only. One process
    imports them one after another and names the first that loads more."""
    program = f"""
import importlib, sys
for module in {MODULES_OF_RESULTS}:
    importlib.import_module(module)
    assert not {LIBRARIES_OF_MODELS} & set(sys.modules), module
"""
    assert not loaded_by(program) & LIBRARIES_OF_MODELS


@pytest.mark.promise
def test_compare_and_report_load_no_model_library(tmp_path: Path) -> None:
    runs: list[str] = []
    for name, values in (("a", [0, 1] * 5), ("b", [1, 1] * 5)):
        record = fake_runs.make_record()
        results = to_jsonable(EvalResults((make_values(values),)))
        files = {"eval_before.json": results, "eval_after.json": results}
        runs.append(str(fake_runs.write_run(tmp_path / name, record=record, files=files)))
    program = "\n".join((verb("compare", *runs), verb("report", runs[0])))
    assert not loaded_by(program) & LIBRARIES_OF_MODELS


REFUSED_EXPORTS = (
    ("--to", "ggf"),
    ("--to", "gguf", "--type", "q9"),
    ("--to", "llama-server", "--type", "lora"),
    ("--to", "gguf"),
    ("--to", "merged", "--out", "FULL"),
    ("--to", "vllm", "--out", "FULL"),
)


def test_an_export_is_refused_before_a_model_library_is_loaded(tmp_path: Path) -> None:
    """By the name of its target or type, a tokenizer that no GGUF holds, or files in its folder."""
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record())
    (run / "adapter").mkdir(exist_ok=True)
    (run / "adapter" / "tokenizer.json").write_text('{"model": {"type": "WordLevel"}}')
    exports: list[str] = []
    for words in REFUSED_EXPORTS:
        paths = [str(run) if word == "FULL" else word for word in words]
        exports.append(verb("export", str(run), *paths, code=2))
    assert not loaded_by("\n".join(exports)) & {"torch", "transformers"}


def test_a_run_that_is_not_trained_yet_is_refused_before_torch(tmp_path: Path) -> None:
    run = str(fake_runs.write_run(tmp_path / "run"))
    program = "\n".join(verb(name, run, code=2) for name in ("eval", "chat"))
    assert not loaded_by(program) & {"torch", "transformers"}


def test_a_model_to_serve_that_is_not_there_is_refused_before_torch(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("models: {json: nowhere}\n")
    program = "\n".join((verb("serve", "nowhere", code=2), verb("serve", str(file), code=2)))
    assert not loaded_by(program) & {"torch", "transformers"}


def make_values(values: list[int]) -> MetricValues:
    ids = tuple(f"test.jsonl:{number}" for number in range(len(values)))
    return MetricValues("test", "exact_match", ids, tuple(map(float, values)))


@pytest.mark.promise
def test_asking_a_server_loads_no_torch() -> None:
    """The tokenizer and the rows of a run are on this side, its model is on the other."""
    imports = "import tunesmith.evaluate.verify.verification"
    assert not loaded_by(imports) & {"torch", "transformers"}


def test_verbs_without_a_model_load_no_torch() -> None:
    imports = "import tunesmith.recipe.load, tunesmith.core.run_dir, tunesmith.core.json_io"
    program = "\n".join((verb("schema"), verb("advise", "--need", "tone"), imports))
    assert not loaded_by(program) & LIBRARIES_OF_MODELS
