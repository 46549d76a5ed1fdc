"""Models of the hub, from a stand-in for its HTTP API (tests/helpers/hub_server.py)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import hub_server
from hub_server import TOKEN, Fault, HubServer
from tunesmith.core.errors import InputError, MachineError
from tunesmith.model.hub.resolve import resolve_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path) -> Iterator[HubServer]:
    """Return a hub with the model `org/tiny`, whose branch `old` has another config."""
    with hub_server.serve(monkeypatch, tmp_path / "home") as server:
        files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
        extra = {"pytorch_model.bin": b"\x80", "onnx/model.onnx": b"x", "code.py": b"import os"}
        repo = server.add("model", "org/tiny", {**files, **extra})
        repo.commit({"config.json": files["config.json"] + b"\n"}, branch="old")
        repo.commit(files, branch="old")
        repo.commit({"config.json": files["config.json"] + b"\n"}, branch="old")
        yield server


def read_config(folder: Path) -> bytes:
    return (folder / "config.json").read_bytes()


def test_only_safe_files_are_downloaded_and_once(hub: HubServer) -> None:
    messages: list[str] = []
    folder = resolve_model("org/tiny", report=messages.append)
    assert messages == ["downloading org/tiny from the hub"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert folder.name == hub.repos["model", "org/tiny"].refs["main"]
    requests = len(hub.requests)
    assert resolve_model("org/tiny", report=messages.append) == folder
    assert (len(messages), len(hub.requests)) == (1, requests)


def test_a_revision(hub: HubServer) -> None:
    repo = hub.repos["model", "org/tiny"]
    folder = resolve_model("org/tiny@old")
    assert folder.name == repo.refs["old"]
    assert resolve_model(f"org/tiny@{repo.refs['old']}") == folder
    assert read_config(folder) != read_config(resolve_model("org/tiny"))
    with pytest.raises(InputError, match="no revision 'nosuch'"):
        resolve_model("org/tiny@nosuch")


@pytest.mark.usefixtures("hub")
def test_a_plan_downloads_no_weights() -> None:
    folder = resolve_model("org/tiny", needs_weights=False)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert (resolve_model("org/tiny") / "model.safetensors").is_file()


def test_an_interrupted_download_is_completed(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.append(Fault("config.json", 403, method="HEAD"))
    with pytest.raises(InputError, match="not allowed to read"):
        resolve_model("org/tiny")
    folder = resolve_model("org/tiny")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_model("org/tiny") == folder
    (folder / "config.json").unlink()
    with pytest.raises(MachineError, match="cannot be reached, and model 'org/tiny'"):
        resolve_model("org/tiny")


def test_weights_with_another_hash_are_refused_and_forgotten(hub: HubServer) -> None:
    hub.faults.append(Fault("model.safetensors", is_altered=True))
    with pytest.raises(MachineError, match=r"model\.safetensors .* its hash differs"):
        resolve_model("org/tiny")
    assert (resolve_model("org/tiny") / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"is_gated": True}, "is gated"), ({"is_private": True}, "or you have no access")],
)
def test_a_model_that_needs_a_token(
    hub: HubServer, settings: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in settings.items():
        setattr(hub.repos["model", "org/tiny"], key, value)
    with pytest.raises(InputError, match=message) as caught:
        resolve_model("org/tiny")
    assert "HF_TOKEN" in caught.value.fix
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert resolve_model("org/tiny").is_dir()
