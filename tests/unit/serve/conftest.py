"""Toy models and adapters, and a server that most tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import save_writer_folder
from tiny_server import LiveServer, make_settings, save_toy_adapter, serving

# other text before each turn than the base's template has, with names of users and thinking
PLAIN_TURNS = (
    "{% for m in messages %}{{ m['role'] }}"
    "{% if m['role'] == 'user' and m['name'] %}{{ ' ' + m['name'] }}{% endif %}"
    "{% if m['reasoning_content'] %}{{ ' (' + m['reasoning_content'] + ')' }}{% endif %}"
    "{{ ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a base that answers with a few letters."""
    return save_writer_folder(tmp_path_factory.mktemp("serve") / "writer")


@pytest.fixture(scope="session")
def adapters(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return adapters of different kinds by name."""
    folder = tmp_path_factory.mktemp("adapters")
    template = folder / "plain.jinja"
    template.write_text(PLAIN_TURNS)
    return {
        "small": save_toy_adapter(folder / "small", writer, seed=1, lora_r=2),
        "large": save_toy_adapter(folder / "large", writer, seed=2, lora_r=8, use_rslora=True),
        "dora": save_toy_adapter(folder / "dora", writer, seed=3, use_dora=True),
        "plain": save_toy_adapter(folder / "plain", writer, seed=4, template=template),
    }


@pytest.fixture(scope="session")
def live(writer: Path, adapters: dict[str, Path]) -> Iterator[LiveServer]:
    """Return a server of all adapters without keys; tests must not change its models."""
    models = {name: str(path) for name, path in adapters.items()}
    models |= {f"{name}-half": f"{adapters[name]}@0.5" for name in ("small", "dora")}
    models["large-zero"] = f"{adapters['large']}@0"
    with serving(make_settings(models, base=str(writer))) as server:
        yield server


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the API keys of a test module are."""
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(autouse=True, scope="session")
def _only_loopback() -> Iterator[None]:
    """Fail if anything in these tests connects to another machine."""
    addresses: list[Any] = []
    is_watching = True

    def note_connection(event: str, args: tuple[Any, ...]) -> None:
        if is_watching and event == "socket.connect":
            addresses.append(args[1])

    sys.addaudithook(note_connection)  # stays to the end of the process
    yield
    is_watching = False
    hosts = {address[0] for address in addresses if isinstance(address, tuple)}
    assert hosts <= {"127.0.0.1", "::1"}, hosts
