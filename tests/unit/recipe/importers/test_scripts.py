"""A shell script of ms-swift: flags become keys, and nothing of it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core.errors import InputError
from tunesmith.recipe.importers.convert import Translation, translate

SCRIPT = """\
# it's a comment
ROWS=2  # rows
OUT=a
OUT="$OUT-b"
CUDA_VISIBLE_DEVICES=0 \\
swift sft \\
    --model org/base \\
    --train_type lora \\
    --dataset org/chats#500 HF::org/more \\
    --torch_dtype bfloat16 --quant_bits 4 \\
    --per_device_train_batch_size "$ROWS" \\
    --gradient_accumulation_steps 4 \\
    --packing \\
    --learning_rate $(rate) \\
    --output_dir "$OUT"
"""


def translate_script(folder: Path, text: str) -> Translation:
    file = folder / "train.sh"
    file.write_text(text)
    return translate(file, folder / "recipe.yaml")


def test_a_command_of_ms_swift(tmp_path: Path) -> None:
    translation = translate_script(tmp_path, SCRIPT)
    chats = {"path": "hf://org/chats", "max_examples": 500}
    assert translation.values == {
        "model": "org/base",
        "method": "qlora",
        "data": [chats, {"path": "hf://org/more"}],
        "batch_size": 8,
        "dtype": "bf16",
    }
    important = {entry.key for entry in translation.untranslated if entry.is_important}
    assert important == {"dataset", "learning_rate", "output_dir"}


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ("pt --max_length 64", "stage", "cpt"),
        ("rlhf --rlhf_type orpo", "loss", "orpo"),
        ("rlhf --beta 0.2", "stage", "preference"),
        ("rlhf --rlhf_type dpo --beta 0.2", "stage", "preference"),
        ("sft --loss_scale all", "train_on", "all"),
        ("sft --split_dataset_ratio 0.1", "eval_split", 0.1),
    ],
)
def test_stages_of_ms_swift(tmp_path: Path, flags: str, key: str, value: object) -> None:
    translation = translate_script(tmp_path, f"swift {flags} --model m --dataset rows.jsonl\n")
    assert translation.values[key] == value


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("echo hello\n", "no training command", 1),
        ("swift sft --model 'a\n", "not a shell command", 1),
        ("swift sft \\\n --model m --dataset d.jsonl \\\n --lora_rank many\n", "lora_r", 0),
        ("swift sft \\\n --model m \\\n --use_hf perhaps\n", "expected true or false", 3),
        ("swift rlhf \\\n --model m --dataset d.jsonl \\\n --rlhf_type grpo\n", "grpo", 3),
    ],
)
def test_scripts_are_refused_by_line(tmp_path: Path, text: str, message: str, line: int) -> None:
    with pytest.raises(InputError, match=message) as raised:
        translate_script(tmp_path, text)
    assert not line or str(raised.value.where).endswith(f"train.sh:{line}")
