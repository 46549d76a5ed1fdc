"""Data sets of the hub, from a stand-in for its HTTP API (tests/helpers/hub_server.py)."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

import hub_server
from hub_server import TOKEN, Fault, HubServer
from tunesmith.core.errors import InputError, MachineError, TunesmithError
from tunesmith.data.readers.sources import open_source
from tunesmith.recipe.load import dump_recipe, load_recipe, read_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.session.hub_data import fetch_sources, pin_hub_data

README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/dev.jsonl
---
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_server.serve(monkeypatch, tmp_path / "home") as server:
        yield server


def make_rows(name: str, count: int) -> str:
    rows = [{"prompt": f"{name} {number}?", "completion": str(number)} for number in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def add_rows(hub: HubServer, **kwargs: Any) -> hub_server.Repo:
    files = {
        "README.md": README,
        "data/train-1.jsonl": make_rows("a", 3),
        "data/train-2.jsonl": make_rows("b", 4),
        "data/dev.jsonl": make_rows("dev", 2),
    }
    return hub.add("dataset", "org/rows", files, **kwargs)


def make_recipe(**values: Any) -> Recipe:
    recipe = read_recipe(None, **{"model": "smollm2-135m-instruct", "data": "org/rows"} | values)
    assert isinstance(recipe, Recipe)
    return recipe


def read_fetched(recipe: Recipe, key: str = "data") -> dict[str, int]:
    """Return the number of rows in each file."""
    counts: dict[str, int] = {}
    for source in fetch_sources(getattr(recipe, key)):
        for path in source.files:
            counts[path.name] = len(open_source(path))
    return counts


def count_downloads(hub: HubServer) -> int:
    return sum("GET" in request and "/resolve/" in request for request in hub.requests)


def test_splits_by_the_key_at_a_commit(hub: HubServer) -> None:
    commit = add_rows(hub).refs["main"]
    pinned, notes = pin_hub_data(make_recipe(eval_data="org/rows"))
    assert notes == ()
    assert pinned.data[0].revision == pinned.eval_data[0].revision == commit
    assert read_fetched(pinned) == {"train-1.jsonl": 3, "train-2.jsonl": 4}
    assert read_fetched(pinned, "eval_data") == {"dev.jsonl": 2}


def test_a_pinned_recipe_reads_the_same_rows_after_a_push_and_without_network(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repo = add_rows(hub)
    pinned, _ = pin_hub_data(make_recipe())
    first = read_fetched(pinned)
    repo.commit({"data/train-3.jsonl": make_rows("c", 5).encode()})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(pinned))
    again = load_recipe(file)
    assert again == pinned
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert read_fetched(pin_hub_data(again)[0]) == first  # type: ignore[arg-type]
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    assert len(read_fetched(pin_hub_data(make_recipe())[0])) == 3


@pytest.mark.parametrize(
    ("setting", "value"), [("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)]
)
def test_without_network_the_last_commit_is_used_and_said(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, setting: str, value: object
) -> None:
    commit = add_rows(hub).refs["main"]
    recipe = make_recipe()
    expected = read_fetched(pin_hub_data(recipe)[0])
    requests = len(hub.requests)
    monkeypatch.setattr(constants, setting, value)
    pinned, notes = pin_hub_data(recipe)
    assert read_fetched(pinned) == expected
    assert len(hub.requests) == requests
    assert len(notes) == 1
    assert f"commit {commit[:12]}, the last one seen" in notes[0]
    with pytest.raises(MachineError, match="the hub cannot be reached"):
        pin_hub_data(make_recipe(data={"path": "org/rows", "revision": "never-seen"}))


def test_branches_tags_and_files(hub: HubServer) -> None:
    repo = add_rows(hub)
    repo.commit({"data/train-1.jsonl": make_rows("a", 9).encode()}, branch="v2")
    recipe = make_recipe(data={"path": "hf://org/rows@v2", "data_files": "data/*-1.jsonl"})
    pinned, _ = pin_hub_data(recipe)
    assert pinned.data[0].revision == repo.refs["v2"]
    assert read_fetched(pinned) == {"train-1.jsonl": 9}
    named = make_recipe(data={"path": "org/rows", "revision": "v2", "split": "train"})
    assert pin_hub_data(named)[0].data[0].data_files == ("data/train-1.jsonl",)


def test_rehearsal_rows_and_files_of_this_machine(hub: HubServer, tmp_path: Path) -> None:
    add_rows(hub)
    file = tmp_path / "mine.jsonl"
    file.write_text(make_rows("mine", 2))
    recipe = make_recipe(data=[str(file)], rehearsal={"data": ["org/rows"], "ratio": 0.1})
    pinned, _ = pin_hub_data(recipe)
    assert pinned.data == recipe.data
    assert pinned.rehearsal is not None
    assert len(pinned.rehearsal.data[0].data_files) == 2


def test_a_file_has_one_role(hub: HubServer) -> None:
    add_rows(hub)
    recipe = make_recipe(eval_data={"path": "org/rows", "split": "train"})
    with pytest.raises(InputError, match=r"name the same file, hf://org/rows/data/train-1\.jsonl"):
        pin_hub_data(recipe)


def test_cached_files_are_not_asked_for_again(hub: HubServer) -> None:
    add_rows(hub)
    pinned, _ = pin_hub_data(make_recipe())
    fetch_sources(pinned.data)
    downloads = count_downloads(hub)
    requests = len(hub.requests)
    fetch_sources(pinned.data)
    assert (count_downloads(hub), len(hub.requests)) == (downloads, requests)
    assert downloads == 3  # the README and two files


@pytest.mark.promise
def test_a_download_that_is_cut_goes_on(hub: HubServer) -> None:
    add_rows(hub)
    pinned, _ = pin_hub_data(make_recipe())
    hub.faults.append(Fault("data/train-2.jsonl", is_cut=True))
    assert read_fetched(pinned) == {"train-1.jsonl": 3, "train-2.jsonl": 4}
    assert count_downloads(hub) == 4  # one file twice, from the cut on


def test_a_file_with_another_hash_is_refused_and_forgotten(hub: HubServer) -> None:
    add_rows(hub)
    pinned, _ = pin_hub_data(make_recipe())
    hub.faults.append(Fault("data/train-2.jsonl", is_altered=True))
    with pytest.raises(MachineError, match=r"train-2\.jsonl .* its hash differs"):
        fetch_sources(pinned.data)
    assert read_fetched(pinned) == {"train-1.jsonl": 3, "train-2.jsonl": 4}


def test_a_small_file_with_another_hash_is_refused(hub: HubServer) -> None:
    add_rows(hub)
    hub.faults.append(Fault("README.md", is_altered=True))
    with pytest.raises(MachineError, match=r"README\.md .* its hash differs"):
        pin_hub_data(make_recipe())


@pytest.mark.parametrize(
    ("fault", "kind", "message", "fix"),
    [
        (Fault("/api/datasets", 500), MachineError, "status 500", "later"),
        (
            Fault("/api/datasets", 429, {"Retry-After": "17"}),
            MachineError,
            "429",
            "wait 17 seconds",
        ),
        (
            Fault("/api/datasets", 429, {"RateLimit": '"api";r=0;t=42'}),
            MachineError,
            "429",
            "wait 42 seconds",
        ),
        (Fault("/api/datasets", 403), InputError, "not allowed to read", "HF_TOKEN"),
        (Fault("/api/datasets", 418), InputError, "status 418", "HF_ENDPOINT"),
    ],
)
def test_errors_of_the_hub(
    hub: HubServer, fault: Fault, kind: type[TunesmithError], message: str, fix: str
) -> None:
    add_rows(hub)
    hub.faults.append(fault)
    with pytest.raises(kind, match=message) as caught:
        pin_hub_data(make_recipe())
    assert caught.value.where == "data: hf://org/rows"
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("repo", "data", "message", "fix"),
    [
        ({}, "org/nosuch", "no data set 'org/nosuch'", "HF_TOKEN"),
        ({}, {"path": "org/rows", "revision": "nosuch"}, "no revision 'nosuch'", "a branch"),
        ({"is_private": True}, "org/rows", "no data set 'org/rows', or you have no", "HF_TOKEN"),
        ({"is_gated": True}, "org/rows", "is gated", "ask for access"),
    ],
)
def test_what_may_not_be_read(
    hub: HubServer, repo: dict[str, bool], data: object, message: str, fix: str
) -> None:
    add_rows(hub, **repo)
    with pytest.raises(InputError, match=message) as caught:
        pin_hub_data(make_recipe(data=data))
    assert fix in caught.value.fix


def test_a_token_opens_private_data_and_is_never_shown(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_rows(hub, is_private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(InputError, match="does not accept the token") as caught:
        pin_hub_data(make_recipe())
    assert "hf_wrong" not in str(caught.value) + caplog.text
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pinned, notes = pin_hub_data(make_recipe())
    assert len(read_fetched(pinned)) == 2
    assert TOKEN not in dump_recipe(pinned) + "".join(notes) + caplog.text


@pytest.mark.usefixtures("hub")
def test_nothing_in_the_cache_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match="cannot be reached, and data set 'org/rows'") as caught:
        pin_hub_data(make_recipe())
    assert "HF_ENDPOINT" in caught.value.fix


def test_a_full_disk_is_noticed_before_the_download(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_rows(hub)
    pinned, _ = pin_hub_data(make_recipe())
    monkeypatch.setattr(
        "tunesmith.core.atomic.shutil.disk_usage", lambda _: SimpleNamespace(free=10)
    )
    downloads = count_downloads(hub)
    with pytest.raises(MachineError, match="disk"):
        fetch_sources(pinned.data)
    assert count_downloads(hub) == downloads


def test_a_loading_script_is_refused(hub: HubServer) -> None:
    hub.add("dataset", "org/script", {"script.py": "import os", "a.zip": "x"})
    with pytest.raises(InputError, match=r"script\.py\); code from the hub is never run"):
        pin_hub_data(make_recipe(data="org/script"))
