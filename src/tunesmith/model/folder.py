"""Whether a model folder is safe and complete, decided before transformers sees it."""

from pathlib import Path


def check_folder(folder: Path) -> None: ...
