"""Names of models that are no name, and a cached model of which some shards are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.hub_repo import HubRef
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


def test_a_snapshot_of_another_program_is_complete_with_all_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    shards = ("model-1.safetensors", "model-2.safetensors")
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / shards[0]).touch()
    ref = HubRef("model", "a/b")
    assert not resolve._is_complete(tmp_path, ref, resolve.HUB_FILES)
    assert resolve._is_complete(tmp_path, ref, resolve.SMALL_HUB_FILES)
    (tmp_path / shards[1]).touch()
    assert resolve._is_complete(tmp_path, ref, resolve.HUB_FILES)
