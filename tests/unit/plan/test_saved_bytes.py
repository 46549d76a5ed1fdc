"""What a forward keeps for its backward, and generation for a row, are the bytes of the plan."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from layer_shapes import make_headers
from quick_families import leave_others_to_slow
from tiny_models import LORA, collate_documents, make_tiny_documents, make_tiny_network
from tunesmith.core.model_spec import ModelSpec
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import PackedCausalLM, wrap_model
from tunesmith.model.hub.families import EQUAL_TYPES, TEXT_FAMILIES, UNIFORM_CLASSES, find_family
from tunesmith.model.hub.part_shapes import measure_norms
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.hub.text_class import build_network
from tunesmith.model.kernels import ops
from tunesmith.plan.activations import ActivationSettings, compute_saved_bytes
from tunesmith.plan.memory import CacheSize, compute_cache_bytes
from wide_configs import SETTINGS, make_wide_config

TOLERANCE = 0.15
LENGTHS = (130, 70, 40, 20)
# in bf16 the formula is that of the kernels, without which more is kept
HAS_BF16 = ops.has_attention()
DTYPES = (*([torch.bfloat16] if HAS_BF16 else []), torch.float32)
CASES = [
    *(("none", "attention"), ("none", "mlp"), ("none", "experts"), ("none", "recurrent")),
    *(("selective", "all-linear"), ("selective", "attention")),
    *(("full", "all-linear"), ("full", "attention")),
]
CACHED_FAMILIES = (
    *("qwen3", "qwen3_5", "qwen3_next", "olmo_hybrid", "lfm2", "granitemoehybrid", "falcon_h1"),
    *("nemotron_h", "gemma4", "gemma4-experts", "phi3", "deepseek_v3", "glm4_moe_lite", "gpt_oss"),
)


def describe(config: PreTrainedConfig, folder: Path) -> ModelSpec:
    """Return the spec of a config without weights."""
    family = find_family(config.model_type)
    assert family is not None
    config.architectures = [family.causal_class]
    config.save_pretrained(folder)
    return read_spec(folder)


def make_model(
    config: PreTrainedConfig, dtype: torch.dtype, settings: ActivationSettings
) -> PackedCausalLM:
    torch.manual_seed(0)
    network = build_network(config, dtype=dtype).requires_grad_(False)
    network.eval()
    METHODS["lora"](network, LORA | {"lora_target_modules": settings.targets})
    checkpointing = settings.checkpointing
    model = wrap_model(network, dtype, gradient_checkpointing=checkpointing)
    model.network.train(checkpointing == "full")  # transformers' switch works in training only
    return model


def measure_saved_bytes(model: PackedCausalLM) -> int:
    """Return the bytes of the tensors that the layers keep, each storage once, weights excluded."""
    batch = collate_documents(make_tiny_documents(LENGTHS))
    known = {p.untyped_storage().data_ptr() for p in model.network.parameters()}
    known |= {b.untyped_storage().data_ptr() for b in model.network.buffers()}
    packed: list[weakref.ref[Tensor]] = []

    def keep(x: Tensor) -> Tensor:
        x = x.detach()  # an output itself would keep its graph, and all weights, forever
        packed.append(weakref.ref(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model.compute_hidden(batch)
    assert hidden.requires_grad
    assert get_trainable_parameters(model.network)
    # what nothing leads to is not kept until the backward, and its address is used again
    storages = [x.untyped_storage() for reference in packed if (x := reference()) is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if address not in known)


def compare_saved_bytes(name: str, spec: ModelSpec, settings: ActivationSettings) -> float:
    """Return the predicted bytes, relative to those that autograd keeps."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[settings.dtype_bytes]
    measured = measure_saved_bytes(make_model(make_wide_config(name), dtype, settings))
    return sum(LENGTHS) * compute_saved_bytes(spec, settings) / measured


def test_every_family_is_compared() -> None:
    types = {make_wide_config(name).model_type for name in SETTINGS}
    assert types >= TEXT_FAMILIES.keys() - EQUAL_TYPES.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", leave_others_to_slow(SETTINGS))
def test_saved_bytes_are_those_of_the_formula(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    spec = describe(make_wide_config(name), tmp_path)
    ratio = compare_saved_bytes(name, spec, ActivationSettings(dtype.itemsize))
    assert ratio == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "targets"), CASES)
@pytest.mark.parametrize("name", SETTINGS)
def test_saved_bytes_with_other_adapters_and_checkpointing(
    name: str, checkpointing: str, targets: str, tmp_path: Path
) -> None:
    spec = describe(make_wide_config(name), tmp_path)
    if targets != "all-linear" and targets not in spec.parts:
        pytest.skip(f"no linear layer belongs to {targets}")
    ratios: list[float] = []
    for dtype in DTYPES:
        settings = ActivationSettings(dtype.itemsize, targets, checkpointing=checkpointing)
        ratios.append(compare_saved_bytes(name, spec, settings))
    assert ratios == pytest.approx([1] * len(DTYPES), abs=TOLERANCE)


@pytest.mark.parametrize("name", UNIFORM_CLASSES)
def test_norms_are_those_of_the_network(name: str, tmp_path: Path) -> None:
    """Their tables describe models whose weights are not there."""
    config = make_wide_config(name)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    assert describe(config, tmp_path).norms == measure_norms(make_headers(network), name)


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
