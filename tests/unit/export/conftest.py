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


@pytest.fixture(scope="session")
def fully_trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changed = {"method": "full", "lora_r": "auto", "learning_rate": 1e-3}
    return save_run(tmp_path_factory.mktemp("full-run"), tiny_llama, **changed)


@pytest.fixture(scope="session")
def dora_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("dora-run"), tiny_llama, use_dora=True)
