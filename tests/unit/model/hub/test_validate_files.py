"""Links, special files and oversized files in an untrusted folder (faults 14 and 15)."""

import json
import os
from pathlib import Path

import pytest

from tunesmith.core.errors import InputError
from tunesmith.model.hub.validate import check_files, check_folder


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "model.safetensors", "README.md"]
)
def test_fault_14_a_link_out_of_the_folder_is_refused_before_it_is_read(
    model_folder: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a key")
    secret.chmod(0)  # whoever read it would fail otherwise
    (model_folder / name).unlink(missing_ok=True)
    (model_folder / name).symlink_to(secret)
    with pytest.raises(InputError, match=f"a link out of its folder, to {secret}") as caught:
        check_folder(model_folder)
    assert caught.value.where == str(model_folder / name)
    assert "copy it into the folder" in caught.value.fix


def test_fault_14_what_a_link_leads_over_does_not_matter(
    model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "t.jinja").write_text("x")
    (model_folder / "additional_chat_templates").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="a link out of its folder"):
        check_folder(model_folder)
    (model_folder / "additional_chat_templates").unlink()
    (model_folder / "additional_chat_templates").mkdir()
    (model_folder / "additional_chat_templates" / "t.jinja").symlink_to("../../outside/t.jinja")
    with pytest.raises(InputError, match="a link out of its folder"):
        check_folder(model_folder)


def test_links_inside_the_folder_pass(model_folder: Path) -> None:
    (model_folder / "chat_template.jinja").write_text("x")
    (model_folder / "same.jinja").symlink_to("chat_template.jinja")
    check_folder(model_folder)
    assert (model_folder / "same.jinja").is_symlink()
    (model_folder / "same.jinja").unlink()
    (model_folder / "same.jinja").symlink_to("../chat_template.jinja")
    with pytest.raises(InputError, match="a link out of its folder"):
        check_folder(model_folder)


def hub_snapshot(model_folder: Path) -> Path:
    """Lay out the files as in the hub's cache: links to blobs."""
    snapshot, blobs = (
        model_folder.parent / "models--x" / "snapshots" / "abc",
        model_folder.parent / "models--x" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(model_folder.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_links_of_the_hubs_cache_pass(model_folder: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(model_folder)
    check_folder(snapshot)
    (tmp_path / "elsewhere").symlink_to(snapshot)
    check_folder(tmp_path / "elsewhere")
    assert all(file.is_symlink() for file in snapshot.iterdir())


def test_fault_14_blobs_that_are_a_link_themselves_are_no_cache(
    model_folder: Path, tmp_path: Path
) -> None:
    snapshot = hub_snapshot(model_folder)
    (tmp_path / "models--x" / "blobs").rename(tmp_path / "home")
    (tmp_path / "models--x" / "blobs").symlink_to(tmp_path / "home")
    with pytest.raises(InputError, match="a link out of its folder"):
        check_folder(snapshot)


@pytest.mark.parametrize("target", ["nowhere", "chat_template.jinja"])
def test_links_to_nothing_and_to_themselves(model_folder: Path, target: str) -> None:
    (model_folder / "chat_template.jinja").symlink_to(target)
    with pytest.raises(InputError, match="cannot be read"):
        check_folder(model_folder)


def test_fault_14_a_pipe_is_no_file(model_folder: Path) -> None:
    os.mkfifo(model_folder / "chat_template.jinja")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        check_folder(model_folder)


def test_fault_14_a_device_is_no_file(model_folder: Path) -> None:
    (model_folder / "chat_template.jinja").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="a link out of its folder, to /dev/zero"):
        check_folder(model_folder)


@pytest.mark.parametrize(
    ("name", "most"), [("tokenizer.json", 64 * 2**20), ("chat_template.jinja", 2**20)]
)
def test_absurd_sizes_are_refused_unread(model_folder: Path, name: str, most: int) -> None:
    with (model_folder / name).open("wb") as file:
        file.truncate(most)
    check_files(model_folder)
    with (model_folder / name).open("wb") as file:
        file.truncate(2**40)  # a hole: takes no room
    with pytest.raises(InputError, match=f"1,099,511,627,776 bytes, more than {most:,}"):
        check_files(model_folder)


def test_a_config_of_more_than_4_mib_is_refused_unread(tmp_path: Path) -> None:
    """Checking a million layer types took four seconds and 304 MB."""
    layer_types = ["full_attention"] * 1_000_000
    (tmp_path / "config.json").write_text(json.dumps({"layer_types": layer_types}))
    with pytest.raises(InputError, match="larger than 4 MiB"):
        check_folder(tmp_path, needs_weights=False)
