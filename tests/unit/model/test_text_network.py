"""Values of recurrent layers that published files hold in fp32: nothing rounds them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from quick_families import leave_others_to_slow
from text_part_configs import make_multimodal_configs
from tiny_models import collate_documents, make_stock_network, make_tiny_documents
from tunesmith.model.adapters import METHODS
from tunesmith.model.causal_lm import compute_cached_logits, load_network, wrap_model
from tunesmith.model.layer_shards import LayerShard
from tunesmith.model.merge import write_merged_weights
from tunesmith.model.quantization import load_quantized
from tunesmith.model.save import save_model
from tunesmith.model.weight_shards import WeightShards, list_frozen

RECURRENT = re.compile(
    r".*\.(A_log|dt_bias|D|o_norm\.weight|(linear_attn|mamba|mixer)\.norm\.weight)"
)
FAMILIES = [
    *("qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid"),
    *("granitemoehybrid", "falcon_h1", "nemotron_h", "nemotron_h-experts"),
]


def is_recurrent(name: str) -> bool:
    return RECURRENT.fullmatch(name) is not None


def round_to_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in bf16 with recurrent ones in fp32, as files of Qwen3.5 hold them."""
    published: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        keeps = is_recurrent(name) or name.endswith("e_score_correction_bias")
        published[name] = tensor if keeps else tensor.bfloat16()
    return published


def rewrite_published(folder: Path) -> dict[str, Tensor]:
    file = folder / "model.safetensors"
    tensors = round_to_published(load_file(file))
    assert any(is_recurrent(name) for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


@pytest.fixture(scope="module", params=leave_others_to_slow(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / request.param
    make_stock_network(request.param).save_pretrained(folder)
    rewrite_published(folder)
    return folder


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return a whole Qwen3.5 and its tensors, under their published names and in their dtypes."""
    torch.manual_seed(0)
    network = AutoModelForImageTextToText.from_config(make_multimodal_configs()["qwen3_5"])
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.2)
    network.save_pretrained(tmp_path / "base")
    return tmp_path / "base", rewrite_published(tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recurrent_values_stay_as_stored(folder: Path, dtype: torch.dtype) -> None:
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    network = load_network(folder, dtype)
    checked = 0
    for name, tensor in network.state_dict().items():
        if is_recurrent(name):
            checked += 1
            assert torch.equal(tensor, wide[name]), name
        elif name.endswith("proj.weight") and ".experts" not in name:
            assert tensor.dtype == dtype
    assert checked >= 3  # A_log, dt_bias and a norm or D, of each recurrent layer
    assert network.dtype == dtype


def test_recurrent_values_stay_beside_4_bits(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, tensor in load_quantized(folder, torch.bfloat16).state_dict().items():
        if is_recurrent(name):
            assert torch.equal(tensor, wide[name]), name


class LoneRank:
    """One of two ranks that never meet: enough to load a part."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def form_groups(self, size: int) -> None:
        assert size == 2


def test_recurrent_values_stay_in_the_parts_of_ranks(folder: Path) -> None:
    parts: list[list[Tensor]] = []
    for rank in (0, 1):
        ranks: Any = LoneRank(rank)
        shards = WeightShards(ranks, 2)
        load_network(folder, torch.bfloat16, shards=shards)
        parts.append([layer.part_B for layer in shards.layers])
    network: Any = load_network(folder, torch.bfloat16)
    for number, layer in enumerate(network.base_model.layers):
        ranks = LoneRank(0)
        complete = LayerShard(list(list_frozen(layer)), ranks, 1).part_B
        joined = torch.cat([part[number] for part in parts])
        assert torch.equal(joined[: len(complete)], complete)


@torch.no_grad()
def test_both_networks_compute_with_them(folder: Path) -> None:
    """Ours, and transformers' with and without its cache, round no more than bf16 does."""
    batch = collate_documents(make_tiny_documents((37,)))
    wide: Any = load_network(folder, torch.float32)
    stock: Any = load_network(folder, torch.bfloat16)
    ids = batch.tokens_T[None]
    exact = wide.base_model(input_ids=ids).last_hidden_state[0]
    theirs = stock.base_model(input_ids=ids).last_hidden_state[0]
    assert compute_cached_logits(stock, ids[0].tolist()).isfinite().all()
    model = wrap_model(stock, torch.bfloat16)
    ours = model.compute_hidden(batch)
    positions = batch.positions_S
    assert ours.dtype == theirs.dtype == torch.bfloat16
    error = (ours - exact[positions]).norm()
    assert error <= 1.5 * (theirs - exact)[positions].norm()
    assert error <= 0.2 * exact[positions].norm()


def test_a_trained_model_is_saved_in_the_dtypes_of_its_base(
    whole: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    base, published = whole
    network = load_network(base, torch.bfloat16)
    METHODS["full"](network, {})
    name = "model.language_model.layers.0.linear_attn.A_log"
    change = torch.full_like(published[name], 2**-20)
    network.get_parameter("model.layers.0.linear_attn.A_log").data += change
    wrap_model(network, torch.bfloat16)
    save_model(network, tmp_path / "saved", base, torch.bfloat16)
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == published.keys()
    for key, tensor in published.items():
        assert saved[key].dtype == tensor.dtype, key
        assert torch.equal(saved[key], tensor + change if key == name else tensor), key


def test_merged_weights_have_the_dtypes_of_their_base(
    whole: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    base, published = whole
    write_merged_weights(base, {}, tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in published.items())
    assert all(merged[name].dtype == tensor.dtype for name, tensor in published.items())
