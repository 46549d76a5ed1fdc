"""`tunesmith init --from`: the file that is written loads, says where its values come from, and
lists the untranslated keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.cli import app
from tunesmith.core.errors import InputError
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.template import write_translated

CONFIG = """\
base_model: org/base
datasets:
  - {path: rows.jsonl, type: completion, field: body}
  - {path: org/chats, type: chat_template}
adapter: lora
sequence_len: 2048
micro_batch_size: 2
gradient_accumulation_steps: 4
seed: 0
learning_rate: 2e-4
sample_packing: true
eval_sample_packing: true
load_in_8bit: true
lora_on_cpu: "a text\\nof two lines"
"""

BATCH_NOTE = "micro_batch_size 2 x gradient_accumulation_steps 4, on one device"
PACKING_REASON = "always on: documents are packed without cross-document attention"
DEFAULTS_REASON = "defaults of Axolotl that the config leaves out; here a rule decides"
WRITTEN = """\
# yaml-language-server: $schema=recipe.schema.json
# Translated from old.yml of Axolotl. `tunesmith plan` shows missing keys.

# Model
model: org/base                       # base_model
method: lora                          # adapter

# Data
data:                                 # datasets
  - {path: ../rows.jsonl, format: text, columns: {text: body}}
  - {path: 'hf://org/chats', format: messages}

# Lengths and steps
max_length: 2048                      # sequence_len
batch_size: 8                         # {BATCH_NOTE}

# Optimizer
learning_rate: 0.0002

# Not translated, and may matter:
#   load_in_8bit: true -> frozen weights are in 16 bits, or in NF4 with method: qlora
#   lora_on_cpu: 'a text of two lines' -> a recipe has no such key

# Not needed here:
#   sample_packing, eval_sample_packing -> {PACKING_REASON}
#   num_epochs 1, lr_scheduler cosine -> {DEFAULTS_REASON}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n')
    path = tmp_path / "old.yml"
    path.write_text(CONFIG)
    return path


def test_the_recipe_has_what_the_config_sets_and_comments_for_the_rest(config: Path) -> None:
    written = write_translated(Path("new/recipe.yaml"), config)
    assert written.recipe.read_text() == (
        WRITTEN.replace("{BATCH_NOTE}", BATCH_NOTE)
        .replace("{PACKING_REASON}", PACKING_REASON)
        .replace("{DEFAULTS_REASON}", DEFAULTS_REASON)
    )
    assert (written.tool, written.reason) == (
        "Axolotl",
        "it has base_model, datasets, adapter, sequence_len",
    )
    recipe = load_recipe(written.recipe)
    assert [source.path.resolve().name for source in recipe.data] == ["rows.jsonl", "chats"]
    assert recipe.data[0].path.exists()
    assert (recipe.batch_size, recipe.learning_rate, recipe.data[0].columns) == (
        8,
        2e-4,
        {"text": "body"},
    )
    assert json.loads(written.schema.read_text())["properties"]["learning_rate"]


def test_nothing_is_written_over_or_for_a_config_that_cannot_be_read(config: Path) -> None:
    with pytest.raises(InputError, match="the file already exists"):
        write_translated(config, config)
    assert config.read_text() == CONFIG
    config.write_text("base_model: [1\n")
    with pytest.raises(InputError, match="not YAML"):
        write_translated(Path("new/recipe.yaml"), config)
    assert not Path("new").exists()


def test_untranslated_keys_are_on_stderr_and_in_the_json(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.excepthook", None)
    with pytest.raises(SystemExit) as ended:
        app.main(
            ["init", "--from", str(config), "--model", "tiny", "--data", "mine.jsonl", "--json"]
        )
    out, err = capsys.readouterr()
    assert not ended.value.code
    assert err.startswith(
        f"{config} is a config of Axolotl: it has base_model, datasets, adapter, sequence_len\n"
    )
    assert "load_in_8bit: true -> frozen weights are in 16 bits" in err
    output = json.loads(out)
    important = {entry["key"] for entry in output["untranslated"] if entry["is_important"]}
    assert important == {"load_in_8bit", "lora_on_cpu"}
    recipe = load_recipe(Path(output["recipe"]))
    assert (recipe.model, recipe.data[0].path.name) == ("tiny", "mine.jsonl")
