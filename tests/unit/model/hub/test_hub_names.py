"""Names of models that are no name, and a cached model of which some shards are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.core.errors import InputError
from tunesmith.model.hub import resolve


@pytest.mark.parametrize(
    "name",
    [
        "a/..",
        "a/...",
        "a/-",
        "a/.b",
        "a--b/c",
        "a/b..c",
        "a" * 300 + "/b",
        "~nobody-here/x",
        "a\0b",
    ],
)
def test_a_name_that_no_model_can_have_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="there is no model"):
        resolve.resolve_model(name)


def test_an_interrupted_download_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ("model-1.safetensors", "model-2.safetensors")
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / shards[0]).touch()
    is_local: list[bool] = []

    def download(*_: object, local_files_only: bool) -> Path:
        is_local.append(local_files_only)
        return tmp_path

    monkeypatch.setattr(resolve, "_download_snapshot", download)
    resolve._download_from_hub("a/b", lambda _: None, resolve.HUB_FILES)
    assert is_local == [True, False]
    (tmp_path / shards[1]).touch()
    resolve._download_from_hub("a/b", lambda _: None, resolve.HUB_FILES)
    assert is_local == [True, False, True]
