"""Finished runs on tiny models, made once; not to be changed."""

from pathlib import Path

import pytest

from tiny_export import save_model, save_run


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("export-model") / "tiny")


@pytest.fixture(scope="session")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("export-run"), tiny_llama)
