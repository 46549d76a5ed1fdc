"""A run of a model whose layers carry state: planned, proven, trained with shared prefixes, saved,
and its answers generated."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hybrid_configs import make_hybrid_configs
from tiny_models import SIZES, WIDE
from tiny_runs import (
    make_tiny_recipe,
    save_model_folder,
    select_steps,
    train,
    write_eval_files,
)
from tunesmith.api import read_record

VOCABULARY = {
    "vocab_size": 259,  # of the tokenizer of a tiny model folder
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 258,
    "bos_token_id": None,
}


@pytest.mark.promise
@pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1", "lfm2"])
def test_a_hybrid_is_trained(family: str, tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "model")
    torch.manual_seed(0)
    config = make_hybrid_configs(SIZES | VOCABULARY, WIDE | VOCABULARY)[family]
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    roles = write_eval_files(tmp_path / "rows")
    recipe = make_tiny_recipe(folder, tmp_path, share_prefixes=True, **roles)
    assert isinstance(recipe.output_dir, Path)
    steps = select_steps(train(recipe))
    assert [step.step for step in steps] == [1, 2, 3]
    record = read_record(recipe.output_dir)
    assert record.plan.model.recurrent is not None
    unproven = {check.kind for check in record.preflight if check.level != "ok"}
    assert unproven == {"EOS is supervised"}  # the folder names another end
    stored = load_file(recipe.output_dir / "adapter" / "adapter_model.safetensors")
    assert any(float(tensor.abs().max()) > 0 for name, tensor in stored.items() if "lora_B" in name)
