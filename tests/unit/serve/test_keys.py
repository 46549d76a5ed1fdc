"""API keys: hashed at rest, readable by their user only, gone at the next request when removed."""

from __future__ import annotations

import asyncio
import hmac
import os
import stat
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse

from tunesmith.core.errors import InputError
from tunesmith.serve.keys import KeyRing, add_key, read_keys, remove_key
from tunesmith.serve.metrics import ServerMetrics
from tunesmith.serve.middleware import AccessMiddleware, AccessRules


def test_a_key_is_found_by_its_secret_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret, key = add_key(path, "ci", models=("json",))
    ring = KeyRing(path)
    assert secret.startswith("tsk_")
    assert len(secret) == 4 + 43  # 32 bytes in base64
    assert ring.find(f"Bearer {secret}") == key
    assert ring.find(f"bearer {secret}") == key
    for wrong in ("", secret, f"Basic {secret}", f"Bearer {secret[:-1]}", f"Bearer {secret}x"):
        assert ring.find(wrong) is None
    assert ring.find(f"Bearer {key.sha256}") is None


def test_how_much_of_a_key_is_right_changes_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes are compared, whole, with all keys: there is nothing that a clock could tell."""
    path = tmp_path / "keys.json"
    secret, _ = add_key(path, "a")
    add_key(path, "b")
    ring = KeyRing(path)
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def note(first: str, second: str) -> bool:
        compared.append((len(first), len(second)))
        return compare(first, second)

    monkeypatch.setattr(hmac, "compare_digest", note)
    for attempt in [secret, "x", secret[:8], secret[:-1] + "!"]:
        compared.clear()
        assert (ring.find(f"Bearer {attempt}") is None) == (attempt != secret)
        assert compared == [(64, 64)] * 2


def test_the_file_holds_no_secret_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    secret, key = add_key(path, "ci")
    content = path.read_text()
    assert secret not in content
    assert secret.removeprefix("tsk_")[:12] not in content
    assert key.sha256 in content
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "ci")
    path.chmod(0o644)
    with pytest.raises(InputError, match="others can read"):
        read_keys(path)


def test_a_link_is_refused(tmp_path: Path) -> None:
    add_key(tmp_path / "real.json", "ci")
    (tmp_path / "keys.json").symlink_to(tmp_path / "real.json")
    with pytest.raises(InputError, match="not a file of this user"):
        read_keys(tmp_path / "keys.json")


def test_a_removed_key_stops_working_in_a_running_server(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret, _ = add_key(path, "ci")
    other, _ = add_key(path, "other")
    ring = KeyRing(path)
    assert ring.find(f"Bearer {secret}") is not None
    remove_key(path, "ci")
    assert ring.find(f"Bearer {secret}") is None
    assert ring.find(f"Bearer {other}") is not None
    path.unlink()
    assert ring.find(f"Bearer {other}") is None


def test_names_and_scopes_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "ci")
    with pytest.raises(InputError, match="there is a key"):
        add_key(path, "ci")
    with pytest.raises(InputError, match="needs a scope"):
        add_key(path, "x", scopes=())
    with pytest.raises(InputError, match="no scope"):
        add_key(path, "x", scopes=("root",))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not a valid key name"):
        add_key(path, "a\nb")
    with pytest.raises(InputError, match="no key"):
        remove_key(path, "nobody")


def test_admin_has_every_scope_and_models_limit_a_key(tmp_path: Path) -> None:
    _, admin = add_key(tmp_path / "keys.json", "boss", scopes=("admin",))
    _, user = add_key(tmp_path / "keys.json", "user", models=("json",))
    assert admin.has_scope("infer")
    assert admin.has_scope("metrics")
    assert not user.has_scope("admin")
    assert user.can_use_model("json")
    assert not user.can_use_model("base")
    assert admin.id != user.id


def test_the_command_line_makes_lists_and_removes_keys(tmp_path: Path, tunesmith) -> None:
    path = str(tmp_path / "keys.json")
    code, out, _ = tunesmith("keys", "add", "ci", "--scope", "infer,metrics", "--keys", path)
    assert code == 0
    secret = out.strip()
    assert KeyRing(Path(path)).find(f"Bearer {secret}") is not None
    code, out, _ = tunesmith("keys", "list", "--keys", path)
    assert code == 0
    assert "ci  infer, metrics  all models" in out
    assert secret not in out
    assert tunesmith("keys", "remove", "ci", "--keys", path)[0] == 0
    assert read_keys(Path(path)) == ()
    assert tunesmith("keys", "remove", "ci", "--keys", path)[0] == 2


@pytest.mark.parametrize("names", ["", " , "])
def test_no_names_are_not_all_models(names: str, tmp_path: Path, tunesmith) -> None:
    path = tmp_path / "keys.json"
    code, _, error = tunesmith("keys", "add", "ci", "--models", names, "--keys", str(path))
    assert code == 2
    assert "names no model" in error
    assert not path.exists()


def test_keys_that_became_unreadable_let_nobody_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    secret, _ = add_key(path, "ci")
    content = path.read_bytes()
    rules = AccessRules(KeyRing(path), ("x",), 1000, lambda _: "infer")
    guard = AccessMiddleware(PlainTextResponse("inside"), rules, ServerMetrics())

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app=guard)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/", headers={"authorization": f"Bearer {secret}"})

    assert asyncio.run(get()).text == "inside"
    path.write_text("{}")
    response = asyncio.run(get())
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "keys_unreadable"
    assert str(path) not in response.text
    assert str(path) in caplog.text
    path.write_bytes(content)
    assert asyncio.run(get()).text == "inside"
