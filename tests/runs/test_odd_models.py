"""Runs of rare models of the newer families: trained with what their weights allow, or refused
with exit code 2."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_models import CONFIGS
from tiny_runs import (
    build_sum_rows,
    make_tiny_recipe,
    plan_recipe,
    save_model_folder,
    select_steps,
    train,
    write_rows,
)
from tunesmith.core.errors import InputError

RunCli = Callable[..., tuple[int, str, str]]
VOCABULARY = {"vocab_size": 259, "eos_token_id": 258, "bos_token_id": None, "pad_token_id": None}


def save_model(family: str, folder: Path, **changes: Any) -> Path:
    """Save random weights of a family with the tokenizer of the tiny models, one token per byte."""
    save_model_folder(folder)
    config = copy.deepcopy(CONFIGS[family])
    for key, value in (VOCABULARY | {"max_position_embeddings": 512} | changes).items():
        setattr(config, key, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe", "nemotron_h"])
def test_without_a_layer_of_experts_all_weights_are_trained(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "model")
    recipe = make_tiny_recipe(folder, tmp_path, method="full", lora_r="auto", max_steps=2)
    assert len(select_steps(train(recipe))) == 2


@pytest.mark.parametrize("family", ["lfm2_moe", "nemotron_h"])
def test_without_a_layer_of_experts_there_is_dora(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "model")
    recipe = make_tiny_recipe(folder, tmp_path, use_dora=True, max_steps=2)
    assert len(select_steps(train(recipe))) == 2


def test_dora_that_peft_could_not_load_is_refused_by_the_plan(tmp_path: Path) -> None:
    """PEFT adapts the weights of this type's MLPs, with or without experts."""
    recipe = make_tiny_recipe(save_model("qwen3_next", tmp_path / "model"), tmp_path, use_dora=True)
    with pytest.raises(InputError, match=r"_proj has no use_dora"):
        plan_recipe(recipe)


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_a_token_beyond_the_second_embedding_is_refused(
    verb: str, tmp_path: Path, tunesmith: RunCli
) -> None:
    """Gemma 4 reads two tables of tokens, and one can be smaller."""
    model = save_model("gemma4", tmp_path / "model", vocab_size_per_layer_input=257)
    data = write_rows(tmp_path / "rows.jsonl", build_sum_rows(1, 6))
    keys = {"model": str(model), "data": str(data), "output_dir": str(tmp_path / "run")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(keys), encoding="utf-8")
    code, _, stderr = tunesmith(verb, str(recipe))
    assert code == 2
    assert "257 rows" in " ".join(stderr.split())
    assert "fix:" in stderr


def test_tokens_before_the_end_of_the_second_embedding_are_trained(tmp_path: Path) -> None:
    changes = {"vocab_size": 300, "vocab_size_per_layer_input": 259}
    folder = save_model("gemma4", tmp_path / "model", **changes)
    assert len(select_steps(train(make_tiny_recipe(folder, tmp_path, max_steps=2)))) == 2
