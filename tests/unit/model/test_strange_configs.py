"""Odd but plausible configs: read from a folder, equal to transformers block by block before and
after two steps of training, and the adapter is the same in PEFT. Families in 4 bits too."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from strange_configs import STRANGE_CONFIGS
from tiny_models import (
    CONFIGS,
    LORA,
    SIZES,
    collate_documents,
    compute_mean_loss,
    make_branching_documents,
    make_tiny_documents,
    make_tiny_network,
)
from tunesmith.core.errors import InputError
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import (
    PackedCausalLM,
    compute_stock_logits,
    load_network,
    wrap_model,
)
from tunesmith.model.compare_layers import StockNetwork, compare_layers
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.quantization import load_quantized
from tunesmith.model.save import save_adapter
from tunesmith.train.losses import sum_weights
from tunesmith.train.preflight_blocks import build_compared_pack

pytestmark = [
    pytest.mark.promise,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
DOCUMENTS = make_tiny_documents((9, 20, 40))
QUANTIZED = (
    *("qwen3_5", "lfm2", "granitemoehybrid", "falcon_h1", "nemotron_h", "olmo_hybrid"),
    *("qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4-experts"),
)
EXACT = 2e-5  # ten times what was measured


def measure_blocks(model: PackedCausalLM, stock: StockNetwork) -> float:
    packs = [
        build_compared_pack(model, DOCUMENTS),
        build_compared_pack(model, make_branching_documents()[:5], should_share=True),
    ]
    differences = list(compare_layers(model, stock, packs, torch.float32))
    return max(difference.worst_token for difference in differences)


def train_two_steps(model: PackedCausalLM) -> None:
    parameters = get_trainable_parameters(model.network)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    model.network.train()
    for _ in range(2):
        batch = collate_documents(DOCUMENTS)
        compute_mean_loss(model, batch, sum_weights(DOCUMENTS)).backward()
        assert all(parameter.grad is not None for parameter in parameters.values())
        optimizer.step()
        optimizer.zero_grad()
    model.network.eval()


def fill_weights(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data += 0.3 * noise
        else:
            parameter.data = 0.5 * noise - 3 if name.endswith("A_log") else 0.2 * noise


@pytest.mark.parametrize("name", STRANGE_CONFIGS)
def test_a_strange_config_trains_as_in_transformers_and_peft(name: str, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_config(STRANGE_CONFIGS[name], dtype=torch.float32)
    fill_weights(network)
    network.save_pretrained(tmp_path)
    assert read_spec(tmp_path).num_layers == network.config.num_hidden_layers
    network = load_network(tmp_path, torch.float32)
    stock = StockNetwork(network)
    METHODS["lora"](network, LORA)
    model = wrap_model(network, torch.float32)
    assert stock.find_changed_weight(model.network) is None
    assert measure_blocks(model, stock) < EXACT
    train_two_steps(model)
    assert measure_blocks(model, stock) < EXACT  # transformers' layers with the adapter merged
    batch = collate_documents(DOCUMENTS[-1:])
    save_adapter(model.network, tmp_path / "adapter", LORA, tmp_path)
    peft = PeftModel.from_pretrained(load_network(tmp_path, torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        ours = model.head.compute_logits(model.compute_hidden(batch))
        theirs = peft.eval()(input_ids=batch.tokens_T[None], use_cache=False).logits[0]
    assert (theirs[batch.positions_S] - ours).norm() < 1e-5 * ours.norm()


def test_a_config_that_transformers_cannot_compute_is_refused(tmp_path: Path) -> None:
    """Its rotation has half of the sizes that the heads have."""
    rotation = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
    config = LlamaConfig(**SIZES, rope_parameters=rotation | {"partial_rotary_factor": 0.5})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    network = load_network(tmp_path, torch.float32)
    with pytest.raises(InputError, match="transformers itself cannot compute it") as caught:
        compute_stock_logits(network, [3, 4, 5], [2])
    assert "config.json" in caught.value.fix


@pytest.mark.parametrize("family", QUANTIZED)
def test_hybrids_and_experts_in_4_bits_are_those_of_transformers(
    family: str, tmp_path: Path
) -> None:
    assert family in CONFIGS
    make_tiny_network(family).save_pretrained(tmp_path)
    network = load_quantized(tmp_path, torch.float32)
    stock = StockNetwork(network)
    METHODS["qlora"](network, LORA)
    model = wrap_model(network, torch.float32)
    assert stock.find_changed_weight(model.network) is None
    assert measure_blocks(model, stock) < EXACT
    train_two_steps(model)
    assert measure_blocks(model, stock) < EXACT
