"""Files that are no data are refused before they are read."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_runs import make_tiny_recipe, plan_recipe
from tunesmith.core.errors import InputError
from tunesmith.data.readers import local_file
from tunesmith.data.readers.sources import open_source

Write = Callable[..., Path]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/environ"]
)
def test_fault_14_files_that_are_no_data_are_refused_before_they_are_read(
    name: str, tmp_path: Path
) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"cannot read|not a regular file|no such file|is a folder"
    ):
        open_source(inside / name)


def test_fault_14_pipes_devices_and_links_to_them_are_refused_before_they_are_opened(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.jsonl"):
        with pytest.raises(InputError, match="not a regular file"):
            open_source(tmp_path / name)


@pytest.mark.parametrize("inside", ["link.txt", "deep/link.md"])
def test_fault_14_a_link_out_of_a_folder_of_texts_is_refused(inside: str, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    (notes / "deep").mkdir(parents=True)
    (notes / "a.txt").write_text("a")
    (tmp_path / "secret.txt").write_text("secret")
    (notes / inside).symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match="a link out of the folder"):
        open_source(notes)
    (notes / inside).unlink()
    (notes / inside).symlink_to(notes / "a.txt")
    assert len(open_source(notes)) == 2, "a link inside the folder is fine"


def test_fault_14_links_to_folders_and_pipes_in_a_folder_of_texts(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("a")
    (notes / "loop").symlink_to(notes)
    (notes / "out").symlink_to("/etc")
    assert len(open_source(notes)) == 1, "they are not followed"
    os.mkfifo(notes / "pipe.txt")
    with pytest.raises(InputError, match="not a regular file"):
        open_source(notes)


def test_fault_14_a_gzip_bomb_is_refused_on_the_way(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_file, "UNCHECKED_BYTES", 2**20)
    path = write(gzip.compress(bytes(30 * 2**20)), "x.jsonl.gz")
    written: list[int] = []
    stock = local_file.TempCopy.write
    monkeypatch.setattr(
        local_file.TempCopy,
        "write",
        lambda self, raw: (written.append(len(raw)), stock(self, raw)),
    )
    with pytest.raises(InputError, match="decompresses to more than 200 times its size"):
        open_source(path)
    assert sum(written) < 9 * 2**20


@pytest.mark.parametrize(
    "address", ["https://x.example/train.jsonl", "http://169.254.169.254/a.csv", "s3://b/c.jsonl"]
)
def test_fault_14_a_url_is_refused_and_nothing_is_fetched(
    address: str, tiny_folder: Path, tmp_path: Path
) -> None:
    message = "this is a URL: data is downloaded from the hub only"
    with pytest.raises(InputError, match=message) as caught:
        plan_recipe(make_tiny_recipe(tiny_folder, tmp_path, data=address))
    assert caught.value.where == address
