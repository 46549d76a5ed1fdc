"""What a forward keeps for its backward, and generation for a row, are the bytes of the plan."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_models import LORA, collate_documents, make_tiny_documents, make_tiny_network
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM, load_network, wrap_model
from tunesmith.model.hub.spec import read_spec
from tunesmith.plan.memory import CacheSize, compute_cache_bytes, compute_saved_bytes

LENGTHS = (100, 70, 64, 22)
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL = "full_attention"
DELTA = {
    "layer_types": ["linear_attention", FULL] * 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
MAMBA2 = {
    "layer_types": ["mamba", "attention"] * 2,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 512,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 64,
    "mamba_n_groups": 1,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_5_text": DELTA,
    "granitemoehybrid": MAMBA2,
    "lfm2": {"layer_types": ["conv", FULL] * 2, "block_auto_adjust_ff_dim": False},
    "qwen3_moe": EXPERTS,
}
CACHED_FAMILIES = (
    *("qwen3", "qwen3_5", "qwen3_next", "olmo_hybrid", "lfm2", "granitemoehybrid", "falcon_h1"),
    *("nemotron_h", "gemma4", "gemma4-experts", "phi3", "deepseek_v3", "glm4_moe_lite", "gpt_oss"),
)


def write_model(model_type: str, folder: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **MODELS[model_type])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def load_model(folder: Path, dtype: torch.dtype) -> PackedCausalLM:
    network = load_network(folder, dtype)
    METHODS["lora"](network, LORA)
    return wrap_model(network, dtype)


def measure_saved_bytes(model: PackedCausalLM) -> int:
    """Return the bytes of the tensors that the layers keep, each storage once, weights excluded."""
    batch = collate_documents(make_tiny_documents(LENGTHS))
    known = {p.untyped_storage().data_ptr() for p in model.network.parameters()}
    known |= {b.untyped_storage().data_ptr() for b in model.network.buffers()}
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model.compute_hidden(batch)
    assert hidden.requires_grad
    assert get_trainable_parameters(model.network)
    return sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_type", MODELS)
def test_saved_bytes_are_those_of_the_formula(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_model(model_type, tmp_path)
    spec = read_spec(tmp_path)
    counted = sum(LENGTHS) * compute_saved_bytes(spec, dtype.itemsize)
    measured = measure_saved_bytes(load_model(tmp_path, dtype))
    assert measured == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("family", CACHED_FAMILIES)
def test_a_row_of_generation_keeps_what_the_plan_counts(family: str, tmp_path: Path) -> None:
    network = make_tiny_network(family)
    network.save_pretrained(tmp_path)
    model = wrap_model(network, torch.float32)
    spec = read_spec(tmp_path)
    assert compute_cache_bytes(spec, CacheSize(0, 1), 4) == model.cache_bytes_per_token > 0
    state_bytes = compute_cache_bytes(spec, CacheSize(1, 0), 4)
    assert state_bytes == model.state_bytes_per_row
    assert bool(state_bytes) == (spec.recurrent is not None)
