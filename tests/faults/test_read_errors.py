"""A disk that fails while a run is read again: the run ends with 3 and words, and goes on later."""

from __future__ import annotations

import builtins
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EIO
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import (
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    save_model_folder,
    train,
    write_eval_files,
)
from tunesmith.core.run_dir import CHECKPOINTS_DIR
from tunesmith.recipe.schema import Recipe
from tunesmith.train import run


def make_recipe(folder: Path, model: Path) -> Recipe:
    evaluated = write_eval_files(folder)
    return make_tiny_recipe(model, folder, **evaluated, save_steps=1, eval_steps=1)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A run that stopped after the checkpoint of step 2, and the adapter of one that did not."""
    folder = tmp_path_factory.mktemp("interrupted")
    model = save_model_folder(folder / "model")
    (folder / "straight").mkdir()
    straight = make_recipe(folder / "straight", model)
    train(straight)
    run_until_saved(run.train(plan_recipe(make_recipe(folder, model))), step=2)
    return folder, read_adapter_bytes(straight)


@contextmanager
def watch_opens(act: Callable[[Path], None]) -> Iterator[None]:
    """Call `act` with each file that Python opens for reading."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (io, builtins):
            patch.setattr(module, "open", make_watched(module.open, act))
        yield


def make_watched(real_open: Callable[..., Any], act: Callable[[Path], None]) -> Callable[..., Any]:
    def open_watched(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if isinstance(file, (str, Path)) and "r" in mode:
            act(Path(file))
        return real_open(file, mode, *args, **options)

    return open_watched


def list_read_files(folder: Path) -> list[Path]:
    """The files below a folder that a resumed run reads."""
    opened: dict[Path, None] = {}
    with watch_opens(lambda path: opened.setdefault(path)):
        list(run.resume(folder / "run"))
    return sorted(path for path in opened if path.is_relative_to(folder) and path.is_file())


def read_checkpoints(folder: Path) -> dict[str, bytes]:
    root = folder / "run" / CHECKPOINTS_DIR
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.promise
def test_a_disk_that_fails_while_resuming_loses_nothing(
    interrupted: tuple[Path, bytes], tmp_path: Path, tunesmith: Callable[..., Any]
) -> None:
    folder, adapter = interrupted
    kept = shutil.copytree(folder / "run", tmp_path / "kept")
    files = list_read_files(folder)
    names = {path.name for path in files}
    assert names >= {"manifest.json", "state.safetensors", "trainer_state.json", "plan.json"}
    assert names >= {"events.jsonl", "fingerprint.json", "train.jsonl", "tokenizer.json"}
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    failed: list[str] = []
    for file in files:
        shutil.rmtree(folder / "run")
        shutil.copytree(kept, folder / "run")
        before = read_checkpoints(folder)

        def fail(path: Path, file: Path = file) -> None:
            if path == file:
                raise OSError(EIO, os.strerror(EIO), str(path))

        with watch_opens(fail):
            code, _, error = tunesmith("resume", str(folder / "run"))
        is_worded = os.strerror(EIO) in error and "fix: " in error
        if code != 3 or not is_worded or read_checkpoints(folder) != before:
            failed.append(f"{file.relative_to(folder)}: {code} {error[-400:]}")
    assert failed == []
