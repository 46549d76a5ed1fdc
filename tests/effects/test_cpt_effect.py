"""Continued pretraining of SmolLM2 on the Python reference lowers held-out bits per byte."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest

from effect_seeds import SEEDS, Record
from tiny_runs import train, write_rows
from tunesmith.api import read_record
from tunesmith.core.types import Json
from tunesmith.recipe.schema import Recipe


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_bits_per_byte_of_the_domain_fall(seed: int, tmp_path: Path, record: Record) -> None:
    # Some topics have two names.
    unique_texts = dict.fromkeys(text[:3000] for text in topics.values() if len(text) > 500)
    texts: list[Json] = [{"text": text} for text in unique_texts]
    test = write_rows(tmp_path / "test.jsonl", texts[::7][:10])
    data = write_rows(tmp_path / "data.jsonl", [text for n, text in enumerate(texts) if n % 7])
    values = {
        "stage": "cpt",
        "data": str(data),
        "test_data": str(test),
        "output_dir": str(tmp_path / "run"),
    }
    size = {"max_length": 512, "batch_tokens": 2048, "max_steps": 6, "seed": seed}
    train(Recipe.model_validate({"model": "smollm2-135m-instruct"} | values | size))
    (change,) = read_record(tmp_path / "run").comparisons
    record(change)
    assert (change.task, change.metric, change.after.n) == ("test", "bits_per_byte", 10)
    assert change.high < 0
