"""Ways to damage a file of a run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_utf8(file: Path) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + b"\xff" + content[middle:])


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut": cut,
    "not UTF-8": damage_utf8,
    "folder": replace_by_folder,
    "loop of links": replace_by_loop,
    **{
        repr(text[-16:]) if text else "empty": lambda file, text=text: file.write_text(text)
        for text in (
            *("", "null", "[]", "{}", "[null]", "3", "NaN", '{"sha256": 1e999}'),
            *("[" * 10**5, "[[" * 10**5 + "\n"),
        )
    },
}
