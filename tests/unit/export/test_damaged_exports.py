"""Each file of a finished run, damaged in each way, under the verbs that use its adapter: refused
with what helps, or without any effect."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from damages import DAMAGES
from tunesmith.core.errors import TunesmithError
from tunesmith.serve.sources import open_adapter, open_base

EXPORTS = ("gguf", "ollama", "vllm")
VERBS = (*EXPORTS, "serve", "adapter_from")
NEW_FILES = ("*.gguf", "*.safetensors", "*config.json", "tokenizer.json", "*.jinja", "Modelfile")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def use(
    tunesmith: Run, finished: Path, tiny_llama: Path, tmp_path: Path
) -> Callable[[str, Path], tuple[int, object, str]]:
    """Return a function of a verb and a run: the exit code, what came out, and the error."""

    def use_run(verb: str, run: Path) -> tuple[int, object, str]:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        if verb == "serve":
            base = open_base(str(tiny_llama), datetime(2026, 1, 1))
            try:
                source = open_adapter(str(run), base)
            except TunesmithError as error:
                return error.exit_code, "", str(error)
            finally:
                base.scratch.cleanup()
            return 0, source.digest, ""
        if verb == "adapter_from":
            words = ["plan", "--model", str(tiny_llama), "--adapter-from", str(run), "--json"]
            data = finished.parent / "train.jsonl"
            code, text, error = tunesmith(*words, "--data", str(data), "--output-dir", str(out))
            settings = json.loads(text)["settings"] if code == 0 else {}
            return code, {key: settings[key] for key in settings if key.startswith("lora")}, error
        code, _, error = tunesmith("export", str(run), "--to", verb, "--out", str(out))
        return code, hash_files(out) if code == 0 else {}, error

    return use_run


def hash_files(folder: Path) -> dict[str, str]:
    """Return the hashes of all files that answers depend on."""
    files = [file for pattern in NEW_FILES for file in folder.rglob(pattern)]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_or_gives_the_same(
    damage: str,
    use: Callable[[str, Path], tuple[int, object, str]],
    finished: Path,
    tmp_path: Path,
) -> None:
    files = sorted(
        str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()
    )
    whole = {verb: use(verb, finished) for verb in VERBS}
    assert all(code == 0 and result for code, result, _ in whole.values())
    codes: set[int] = set()
    # each file meets one export and one of the other verbs, in turns
    for index, name in enumerate(files):
        turn = index + list(DAMAGES).index(damage)
        for verb in (EXPORTS[turn % 3], VERBS[3 + turn % 2]):
            copy = shutil.copytree(finished, tmp_path / "damaged" / "run")
            DAMAGES[damage](copy / name)
            code, result, error = use(verb, copy)
            where = f"{verb}: {name}: {error}"
            assert code in (0, 2, 3, 4), where
            assert "Traceback" not in error, where
            if code:
                assert "fix: " in error, where
            else:
                assert result == whole[verb][1], where
            codes.add(code)
            shutil.rmtree(tmp_path / "damaged")
    assert 2 in codes, "the adapter itself was damaged, too"
