from pathlib import Path

import pytest

from tunesmith.core.hub_names import (
    format_path,
    is_hub_id,
    is_hub_path,
    make_hub_path,
    pin_model_name,
    remove_commit,
    split_hub_path,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("name", ["org/name", "org/name@v1.0", "o1/n.a-m_e", f"org/name@{COMMIT}"])
def test_names_of_repositories(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["name", "/org/name", "org/name/more", "org/name@", "../name", "org/..", "org/a--b", ""]
)
def test_what_is_no_repository(name: str) -> None:
    assert not is_hub_id(name)


def test_a_model_is_pinned_to_the_commit_of_its_snapshot() -> None:
    snapshot = Path(f"/cache/models--org--name/snapshots/{COMMIT}")
    assert pin_model_name("org/name", snapshot) == f"org/name@{COMMIT}"
    assert pin_model_name("org/name@main", snapshot) == f"org/name@{COMMIT}"
    assert pin_model_name("org/other", snapshot) == "org/other"
    assert pin_model_name("org/name", Path("/models/name")) == "org/name"
    assert remove_commit(f"org/name@{COMMIT}") == "org/name"
    assert remove_commit("org/name@v1.0") == "org/name@v1.0"


@pytest.mark.parametrize("name", ["org/rows", "org/rows@v2", "hf://org/rows"])
def test_a_name_that_is_only_on_the_hub(tmp_path: Path, name: str) -> None:
    path = make_hub_path(name, tmp_path)
    assert path == "hf://" + name.removeprefix("hf://")
    assert is_hub_path(Path(path))


def test_what_is_here_wins(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("data/train", "org/rows.jsonl", "org/rows.jsonl.gz", "rows", "./org/rows"):
        assert make_hub_path(name, tmp_path) == "", name


def test_the_path_of_a_data_set_is_split() -> None:
    assert split_hub_path(Path("hf://org/rows")) == ("org/rows", "")
    assert split_hub_path(Path("hf://datasets/org/rows@v2")) == ("org/rows", "v2")
    assert split_hub_path(Path("hf://org/rows@refs/convert/parquet")) == (
        "org/rows",
        "refs/convert/parquet",
    )
    with pytest.raises(ValueError, match=r"data_files: sub/train\.jsonl"):
        split_hub_path(Path("hf://org/rows/sub/train.jsonl"))
    with pytest.raises(ValueError, match="hf://org/name"):
        split_hub_path(Path("hf://rows"))


def test_paths_are_shown_as_the_hub_names_them() -> None:
    cached = Path(f"/home/me/hub/datasets--org--rows/snapshots/{COMMIT}/data/train.jsonl")
    assert format_path(cached) == "hf://org/rows@0123456789ab/data/train.jsonl"
    assert format_path(Path("hf://org/rows")) == "hf://org/rows"
    assert format_path(Path("data/train.jsonl")) == "data/train.jsonl"
