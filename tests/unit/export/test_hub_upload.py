"""`tunesmith export --to hub`, to a stand-in for the hub (tests/helpers/hub_server.py)."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import hub_server
from hub_server import TOKEN, Fault, HubServer
from tunesmith.core.errors import GateError, InputError, MachineError
from tunesmith.export import export
from tunesmith.export.export import export_to_hub
from tunesmith.export.request import check_target

REPO = "me/my-adapter"
# huggingface_hub calls its HTTP client in a way that the client has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_server.serve(monkeypatch, tmp_path / "home") as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def get_files(server: HubServer, repo: str = REPO) -> dict[str, bytes]:
    stored = server.repos["model", repo]
    return stored.commits[stored.refs["main"]]


def test_the_adapter_is_verified_and_committed_once(server: HubServer, finished: Path) -> None:
    result = export_to_hub(finished, check_target(REPO))
    stored = server.repos["model", REPO]
    assert result.upload is not None
    assert stored.is_private
    assert not result.upload.is_public
    assert len(stored.commits) == 2  # the repository's own, and ours
    assert result.upload.commit == stored.refs["main"]
    assert result.upload.url.startswith(server.endpoint)
    assert result.parity.same_answers == result.parity.prompts
    files = get_files(server)
    weights = finished / "adapter" / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"] == weights.read_bytes()
    assert {"README.md", "adapter_config.json", "tokenizer.json", "tunesmith.json"} <= set(files)
    assert "manifest.json" not in files
    assert result.upload.files == len(files) - 1  # without .gitattributes
    assert not (finished / "export").exists()


def test_what_is_uploaded_names_no_folder_and_no_token(
    server: HubServer, finished: Path, tiny_llama: Path
) -> None:
    export_to_hub(finished, check_target(REPO))
    files = get_files(server)
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == tiny_llama.name
    for name, content in files.items():
        for secret in (str(finished.parent), str(tiny_llama.parent), TOKEN):
            assert secret.encode() not in content, name


def test_a_scaled_adapter_in_a_public_repository(server: HubServer, finished: Path) -> None:
    server.repos["model", REPO] = hub_server.Repo()
    server.repos["model", REPO].commit({"notes.txt": b"kept"})
    target = check_target(REPO, is_public=True)
    assert "a public repository with 1 file" in target.description
    result = export_to_hub(finished, target, scale=0.5)
    trained = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    files = get_files(server)
    assert json.loads(files["adapter_config.json"])["lora_alpha"] == trained["lora_alpha"] / 2
    assert files["notes.txt"] == b"kept"
    assert result.scale == 0.5


@pytest.mark.parametrize(
    ("repo", "settings", "message"),
    [
        (None, {}, "the repository is missing"),
        ("adapter", {}, "'adapter' is not a repository name"),
        ("me/adapter@main", {}, "is not a repository name"),
        ("me/open", {}, "me/open exists and is public"),
        ("me/closed", {"is_public": True}, "me/closed exists and is private"),
    ],
)
def test_targets_that_are_refused(
    server: HubServer, repo: str | None, settings: dict, message: str
) -> None:
    server.add("model", "me/open", {"a": "b"})
    server.add("model", "me/closed", {"a": "b"}, is_private=True)
    with pytest.raises(InputError, match=message) as caught:
        check_target(repo, **settings)
    assert caught.value.fix


@pytest.mark.usefixtures("server")
def test_a_missing_token_and_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(InputError, match="does not accept the token") as caught:
        check_target(REPO)
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="no token for the hub"):
        check_target(REPO)


@pytest.mark.usefixtures("server")
def test_a_token_without_the_right_to_write(finished: Path) -> None:
    target = check_target("others/adapter")
    with pytest.raises(InputError, match="not allowed to write to"):
        export_to_hub(finished, target)


@pytest.mark.usefixtures("server")
def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError) as caught:
        check_target(REPO)
    assert caught.value.message == "the hub cannot be reached"
    assert "check the network" in caught.value.fix, "and not to download anything"


@pytest.mark.promise
def test_an_upload_that_fails_and_one_that_arrives_damaged(
    server: HubServer, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults.append(Fault("/commit/", 500, method="POST"))
    with pytest.raises(MachineError, match="status 500"):
        export_to_hub(finished, check_target(REPO))
    assert set(get_files(server)) == {".gitattributes"}
    put = hub_server.HubHandler._commit

    def commit_damaged(self: hub_server.HubHandler, kind: str, repo_id: str, body: bytes) -> None:
        for oid, content in self.hub.large_files.items():
            self.hub.large_files[oid] = content[:-1] + bytes([content[-1] ^ 1])
        put(self, kind, repo_id, body)

    monkeypatch.setattr(hub_server.HubHandler, "_commit", commit_damaged)
    with pytest.raises(MachineError, match=r"does not hold adapter_model\.safetensors"):
        export_to_hub(finished, check_target(REPO))


def test_nothing_is_uploaded_if_the_gate_refuses(
    server: HubServer, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise GateError("other answers")

    monkeypatch.setattr(export, "refuse_mismatch", refuse)
    with pytest.raises(GateError, match="other answers"):
        export_to_hub(finished, check_target(REPO))
    assert ("model", REPO) not in server.repos


# ---------------------------------------------------------------- the command line


def test_the_command_asks_and_obeys(
    server: HubServer,
    finished: Path,
    tunesmith: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("export", str(finished), "--to", "hub", "--repo", REPO)
    code, _, stderr = tunesmith(*words)
    assert code == 2
    assert "stdin is not a terminal" in stderr
    assert "add --yes" in stderr
    terminal, keyboard = os.openpty()
    with os.fdopen(keyboard, "r") as stdin, os.fdopen(terminal, "wb", buffering=0) as typed:
        monkeypatch.setattr("sys.stdin", stdin)
        typed.write(b"n\n")
        assert tunesmith(*words)[0] == 130
    assert ("model", REPO) not in server.repos
    code, stdout, stderr = tunesmith(*words, "--yes", "--json")
    assert code == 0, stderr
    output = json.loads(stdout)
    assert output["upload"]["commit"] == server.repos["model", REPO].refs["main"]
    assert TOKEN not in stdout + stderr


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to", "hub", "--yes"), "the repository is missing"),
        (("--to", "hub", "--yes", "--repo", REPO, "--out", "x"), "--out has no effect"),
        (("--to", "peft", "--repo", REPO), "--repo has no effect with --to peft"),
        (("--to", "peft", "--public"), "--public has no effect with --to peft"),
    ],
)
def test_flags_that_do_not_belong_together(
    finished: Path,
    tunesmith: Callable[..., tuple[int, str, str]],
    flags: tuple[str, ...],
    message: str,
) -> None:
    code, _, stderr = tunesmith("export", str(finished), *flags)
    assert code == 2
    assert message in stderr


def test_a_run_that_is_none_is_refused_first(
    server: HubServer, tmp_path: Path, tunesmith: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, stderr = tunesmith("export", str(tmp_path / "no"), "--to", "hub", "--repo", REPO)
    assert code == 2
    assert "no such run folder" in stderr
    assert server.requests == []
