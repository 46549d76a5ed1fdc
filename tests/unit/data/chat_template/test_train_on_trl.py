"""The ids and masks of TRL's SFTTrainer without completion_only_loss and assistant_only_loss."""

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_runs import save_model_folder
from toy_chat import assistant, user
from tunesmith.core.types import Json, Row
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.formats.parse import parse_row

pytestmark = [pytest.mark.promise, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROWS: dict[str, list[Json]] = {
    "messages": [
        {"messages": [user("one"), assistant("two")]},
        {"messages": [user("one"), assistant("two"), user("three"), assistant("four")]},
    ],
    "completion": [
        {"prompt": [user("one")], "completion": [assistant("two")]},
        {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]},
    ],
}


@pytest.mark.parametrize(
    ("row_format", "trl_keys"),
    [
        ("messages", {"assistant_only_loss": False}),
        ("completion", {"completion_only_loss": False}),
    ],
)
def test_masks_are_those_of_trl(row_format: str, trl_keys: dict[str, Any], tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    from datasets import Dataset

    folder = save_model_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="<|text|>")
    config = SFTConfig(
        str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False, packing=False, **trl_keys
    )
    rows = ROWS[row_format]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    renderer = Renderer.from_folder(folder, now=datetime(2026, 3, 4)).train_on("all")
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        batch = trainer.data_collator([theirs])
        labels_L = batch["labels"][0].numpy()
        example = parse_row(Row("r:1", row), row_format, has_template=True)
        (document,) = renderer.render(example).documents
        assert document.tokens_L.tolist() == batch["input_ids"][0].tolist()
        assert np.array_equal(document.weights_L[1:] > 0, labels_L[1:] != -100)
