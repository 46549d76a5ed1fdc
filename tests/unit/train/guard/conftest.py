"""The model of the tests that run under guard."""

from pathlib import Path

import pytest

from tiny_runs import build_sum_rows, make_tiny_recipe, train, write_rows


@pytest.fixture(scope="package")
def trained_model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained until its answers have a form that can be lost."""
    folder = tmp_path_factory.mktemp("learnt")
    data = str(write_rows(folder / "rows.jsonl", build_sum_rows(1, 24)))
    train(
        make_tiny_recipe(
            tiny_folder,
            folder,
            data=data,
            method="full",
            lora_r="auto",
            num_train_epochs=16,
            batch_size=6,
            learning_rate=5e-3,
        )
    )
    return folder / "run" / "model"
