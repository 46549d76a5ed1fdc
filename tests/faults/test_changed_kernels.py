"""A run is continued with the kernels that it began with, or says that it is not."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from tiny_runs import make_tiny_recipe, plan_recipe, run_until_saved, save_model_folder
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult, Event
from tunesmith.core.json_io import read_json
from tunesmith.model.kernels import build
from tunesmith.model.kernels.build import Kernels
from tunesmith.session import fingerprint
from tunesmith.train import run

pytestmark = pytest.mark.skipif(build.load_library() is None, reason="needs a C compiler")

NO_KERNELS = Kernels(None, problem="there is no C compiler: cc, gcc or clang")


def select_checks(events: Iterable[Event], kind: str) -> list[CheckResult]:
    return [event for event in events if isinstance(event, CheckResult) and event.kind == kind]


def use_kernels(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    """As in a process that loads these."""
    for module in (build, fingerprint):
        monkeypatch.setattr(module, "load_kernels", lambda: kernels)


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A bf16 run after its first checkpoint, and the adapter of the same run to its end."""
    folder = tmp_path_factory.mktemp("bf16")
    model = save_model_folder(folder / "model")
    complete = make_tiny_recipe(model, folder / "complete", dtype="bf16", save_steps=1)
    events = list(run.train(plan_recipe(complete)))
    assert not select_checks(events, "kernels")
    interrupted = make_tiny_recipe(model, folder / "interrupted", dtype="bf16", save_steps=1)
    run_until_saved(run.train(plan_recipe(interrupted)), step=1)
    adapter = folder / "complete" / "run" / "adapter" / "adapter_model.safetensors"
    return folder / "interrupted" / "run", adapter.read_bytes()


@pytest.mark.promise
def test_a_bf16_run_is_not_continued_with_other_kernels(
    half_precision: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, adapter = half_precision
    assert "kernels" in read_json(path / "checkpoints" / "step-1" / "manifest.json")
    actual = build.load_kernels()
    others = (
        (NO_KERNELS, r"kernels: compiled from \w{16}, OpenMP threads -> none"),
        (dataclasses.replace(actual, has_threads=False), r"kernels: .* -> .*, a single thread"),
        (dataclasses.replace(actual, sources="0" * 64), r"kernels: .* -> compiled from 0000"),
    )
    for other, message in others:
        with monkeypatch.context() as patch:
            use_kernels(patch, other)
            with pytest.raises(InputError, match=rf"(?s)inputs have changed.*\n  {message}"):
                next(run.resume(path))
    recompiled = dataclasses.replace(actual, sha256="0" * 64)
    copied = Path(shutil.copytree(path, path.parent / "recompiled"))
    with monkeypatch.context() as patch:
        use_kernels(patch, recompiled)
        (warning,) = select_checks(list(run.resume(copied)), "rounding")
    assert warning.evidence.startswith("machine.kernels: sha256")
    assert list(run.resume(path))
    assert (path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.promise
def test_a_run_without_kernels_says_so_and_fp32_needs_none(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = make_tiny_recipe(tiny_folder, tmp_path / "half", dtype="bf16", save_steps=1)
    single = make_tiny_recipe(tiny_folder, tmp_path / "single", save_steps=1)
    run_until_saved(run.train(plan_recipe(half)), step=1)
    run_until_saved(run.train(plan_recipe(single)), step=1)
    use_kernels(monkeypatch, NO_KERNELS)
    path = tmp_path / "half" / "run"
    events = list(run.resume(path, allow_changes=True))
    (warning,) = select_checks(events, "kernels")
    assert (warning.level, warning.step) == ("warn", 1)
    assert "plain torch" in warning.evidence
    assert "no C compiler" in warning.evidence
    assert "kernels: compiled" in read_json(path / "record.json")["input_changes"][0]
    assert not select_checks(list(run.resume(tmp_path / "single" / "run")), "rounding")
    fresh = make_tiny_recipe(tiny_folder, tmp_path / "fresh", dtype="bf16")
    (warning,) = select_checks(list(run.train(plan_recipe(fresh))), "kernels")
    assert (warning.level, warning.step) == ("warn", 0)
