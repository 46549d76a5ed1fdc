"""The gain of continued pretraining over the base model remains after a fine-tuning stage."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest

import tunesmith
from effect_seeds import SEEDS, Record
from tiny_runs import write_rows
from tunesmith import api
from tunesmith.api import read_record
from tunesmith.core.types import Json
from tunesmith.recipe.load import read_recipe
from tunesmith.recipe.schema import Stages
from tunesmith.train import stages

DEMO = Path(tunesmith.__file__).parent / "recipe" / "demo"


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_domain_is_still_likelier_after_both(seed: int, tmp_path: Path, record: Record) -> None:
    unique_texts = dict.fromkeys(text[:2000] for text in topics.values() if len(text) > 500)
    texts: list[Json] = [{"text": text} for text in unique_texts]
    test = str(write_rows(tmp_path / "test.jsonl", texts[::4]))
    data = str(write_rows(tmp_path / "data.jsonl", [text for n, text in enumerate(texts) if n % 4]))
    cpt = {"data": data, "test_data": test, "max_length": 512, "batch_tokens": 2048, "max_steps": 5}
    sft = {
        "data": str(DEMO / "train.jsonl"),
        "batch_size": 2,
        "max_steps": 3,
        "learning_rate": 3e-4,
    }
    shared = {
        "model": "smollm2-135m-instruct",
        "output_dir": str(tmp_path / "run"),
        "lora_r": 16,
        "seed": seed,
    }
    recipe = read_recipe({**shared, "stage": [{"cpt": cpt}, {"sft": sft}]})
    assert isinstance(recipe, Stages)
    stage_inputs = stages.load_stage_inputs(recipe)
    list(api.train(stages.make_staged_plan(stage_inputs), stage_inputs))
    (change,) = read_record(tmp_path / "run").comparisons
    record(change)
    assert (change.task, change.metric) == ("1-cpt test", "bits_per_byte")
    assert change.after.n == len(texts[::4]) >= 16
    assert change.high < 0
