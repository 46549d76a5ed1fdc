"""Asking for help is quick: no model library is loaded before a verb needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "tokenizers", "numpy", "gguf", "safetensors"}

LOADED = "import sys\nprint('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"


def loaded_by(program: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{LOADED}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.rpartition("LOADED ")[2].split())


def verb(*words: str) -> str:
    call = f"app.main({list(words)})"
    return (
        f"from tunesmith.cli import app\ntry:\n    {call}\n"
        "except SystemExit as ended:\n    assert not ended.code"
    )


@pytest.mark.parametrize(
    "words", [("--help",), ("--version",), ("train", "--help"), ("data", "show", "--help")]
)
def test_help_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    assert not loaded_by(verb(*words)) & HEAVY


def test_importing_the_package_loads_no_torch() -> None:
    assert not loaded_by("import tunesmith") & {"torch", "transformers"}


def test_verbs_without_a_model_load_no_torch() -> None:
    assert not loaded_by(verb("schema")) & {"torch", "transformers"}
    assert not loaded_by(verb("advise", "--need", "tone")) & {"torch", "transformers"}
    assert not loaded_by(
        "import tunesmith.recipe.load, tunesmith.core.run_dir, tunesmith.core.json_io"
    ) & {
        "torch",
        "transformers",
    }
